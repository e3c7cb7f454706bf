"""The options of a streaming job: each refusal is a sentence; which runner does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distilbeam.pipelines.engine.prism import choose_runner
from distilbeam.pipelines.streaming.kafka_client import parse_place
from distilbeam.pipelines.streaming.settings import StreamSettings


def settings(**options: Any) -> StreamSettings:
    return StreamSettings.of({"source": "kafka:b:9092:t", "out": "o", "schema": "key:string", **options})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"source": "sqs:x"},
            "--source takes kafka:PLACE, kafka-java:PLACE, pubsub:PLACE, parquet:PLACE, letters:PLACE, got 'sqs:x'",
        ),
        ({"source": "kafka:"}, "--source takes kafka:PLACE, .* got 'kafka:'"),
        ({"out": None}, "--out must be given"),
        ({"schema": ""}, "--schema must be given for messages from kafka, such as"),
        ({"window_s": 0.0}, "--window-s: must be greater than or equal to 0.1, got 0.0"),
        ({"window_s": "a minute"}, "--window-s: must be a valid number, got 'a minute'"),
        ({"shards": 0}, "--shards: must be greater than or equal to 1, got 0"),
        ({"start": "newest"}, "--start: must be 'resume', 'earliest' or 'latest', got 'newest'"),
        ({"until": "tomorrow"}, "--until takes latest or a time such as 2026-01-31T02:00:00[+]00:00, got 'tomorrow'"),
        ({"id": "name"}, "--id: must be 'key', got 'name'"),
        ({"format": "msgpack"}, "--format: must be 'json', 'bytes', 'avro' or 'protobuf', got 'msgpack'"),
        ({"max_failures": "many"}, "--max-failures takes a number or a share such as 5%, got 'many'"),
        ({"max_failures": "101%"}, "--max-failures takes a number or a share such as 5%, got '101%'"),
        ({"source": "pubsub:s", "until": "latest"}, "--until is for kafka: alone, leave it out for pubsub:"),
        ({"source": "parquet:x", "event_time": "at"}, "--event-time is for messages, leave it out for parquet:"),
        ({"windows_s": 3}, "--windows-s is not a setting; did you mean --window-s[?]"),
    ],
)
def test_what_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        settings(**options)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"--window-s: .*\n--shards: .*\n--start: "):
        settings(window_s=0, shards=0, start="newest")


def test_failures_are_a_number_or_a_share_of_a_hundred_messages_or_more() -> None:
    def allowed(text: str, messages: int) -> float | None:
        return settings(max_failures=text).failures_allowed(messages)

    assert [allowed("", 10), allowed("3", 10), allowed("5%", 10), allowed("5%", 1_000)] == [None, 3, 5, 50]


def test_what_has_no_end() -> None:
    assert settings().unbounded
    assert settings(until="2999-01-01").unbounded
    assert not settings(until="2026-01-31T02:00:00+01:00").unbounded
    assert not settings(until="latest").unbounded
    assert settings(source="pubsub:s").unbounded
    assert not settings(source="letters:folder").unbounded


def test_dead_letters_lie_beside_the_labels() -> None:
    assert settings(source="parquet:x", out="gs://b/labels/").letters == "gs://b/labels-deadletter"


def test_places_and_settings_of_kafka(tmp_path: Path) -> None:
    (tmp_path / "client.properties").write_text("# secret\nsasl.password = a=b\n\nsecurity.protocol=SASL_SSL\n")
    topic = parse_place(
        "one:9092,two:9092:clicks", [f"@{tmp_path / 'client.properties'}", "isolation.level=read_uncommitted"]
    )
    assert (topic.brokers, topic.name) == ("one:9092,two:9092", "clicks")
    settings = topic.consumer_settings()
    assert settings["sasl.password"] == "a=b"
    assert settings["isolation.level"] == "read_uncommitted"
    assert settings["enable.auto.commit"] == "false"
    assert "a=b" not in repr(topic), "a password is not printed"
    assert parse_place("b:9092:t", []).consumer_settings()["isolation.level"] == "read_committed"
    for place in ("topic", "host:9092", ":topic", "host:9092:"):
        with pytest.raises(ValueError, match=r"--source takes kafka:HOST:PORT,.*:TOPIC, got"):
            parse_place(place, [])
    with pytest.raises(ValueError, match="--consumer: there is no file nowhere"):
        parse_place("b:9092:t", ["@nowhere"])
    with pytest.raises(ValueError, match="--consumer takes KEY=VALUE or @FILE, got 'secret'"):
        parse_place("b:9092:t", ["secret"])
    with pytest.raises(ValueError, match=r"--consumer: enable\.auto\.commit is set by the job itself"):
        parse_place("b:9092:t", ["enable.auto.commit=true"])


def test_the_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("PRISM", raising=False)
    sentence = "FnApiRunner, writes nothing before its source has ended, .* name Prism with the environment variable PRISM or put"
    with pytest.raises(ValueError, match=sentence):
        choose_runner([], unbounded=True)
    for name in ("DirectRunner", "apache_beam.runners.portability.fn_api_runner.FnApiRunner"):
        with pytest.raises(ValueError, match="writes nothing before its source has ended"):
            choose_runner([f"--runner={name}"], unbounded=True)
        assert choose_runner([f"--runner={name}"], unbounded=False).flags == (f"--runner={name}",)
    assert choose_runner([], unbounded=False).flags == ()
    assert choose_runner(["--runner=FlinkRunner"], unbounded=True).prism is None
    monkeypatch.setenv("PRISM", "nowhere")
    with pytest.raises(ValueError, match="the environment variable PRISM must name a program, got 'nowhere'"):
        choose_runner([], unbounded=True)
    prism = tmp_path / "prism"
    prism.write_text("")
    prism.chmod(0o755)
    monkeypatch.delenv("PRISM")
    for flags in ([], ["--runner=PrismRunner"], ["--runner", "PrismRunner", f"--prism_location={prism}"]):
        chosen = choose_runner([*flags, "--job_name=x"], unbounded=True)
        assert chosen.prism == prism
        assert chosen.flags[:2] == ("--job_name=x", "--runner=PortableRunner")
        assert chosen.flags[-1] == "--environment_type=LOOPBACK"
