"""The streaming job on a bounded reading of librdkafka's mock broker: no Java, no Prism, real protocol."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w
from engines import SCHEMA, labels_in, letters_in, mock_broker, right_logprobs, rows, send
from problem import CLASSES, asked, write_problem

from distilbeam.pipelines import run
from distilbeam.pipelines.config import LabelConfig, load_any_config
from distilbeam.pipelines.streaming.job import StreamJob, unsettled
from distilbeam.pipelines.streaming.journal import Journal
from distilbeam.pipelines.streaming.kafka_client import Topic
from distilbeam.pipelines.streaming.kafka_reader import Reading
from distilbeam.pipelines.streaming.offsets import Offsets
from distilbeam.pipelines.streaming.settings import StreamSettings
from distilbeam.pipelines.streaming.state import StreamState
from distilbeam.storage.stores import store_of
from distilbeam.teacher.softlabels import decode, read_manifest

TOPIC = "examples"
FLAGS = ("--runner=FnApiRunner",)


@pytest.fixture
def broker() -> Iterator[str]:
    with mock_broker() as address:
        yield address


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps(config_of(tmp_path)))
    return path


def config_of(directory: Path, **arguments: Any) -> dict[str, Any]:
    return {
        "data": {"pool": "unused", "id": "key", "carry": ["x"], "num_classes": CLASSES},
        "teacher": {
            "kind": "torch",
            "model": "logging_teacher:LoggingTeacher",
            "arguments": {"log": str(directory / "asked.log"), **arguments},
            "input": {"columns": ["x"]},
        },
        "engine": {"teacher_batch": 32},
    }


def settings_of(broker: str, config: Path, **options: Any) -> StreamSettings:
    given = {"schema": SCHEMA, "until": "latest", "window_s": 1.0, **options}
    return StreamSettings(source=f"kafka:{broker}:{TOPIC}", out=str(config.parent / "labels"), **given)


def label(broker: str, config: Path, **options: Any) -> StreamState:
    settings = load_any_config(config)
    assert isinstance(settings, LabelConfig)
    return StreamJob(settings, settings_of(broker, config, **options), FLAGS).run()


def settled(config: Path) -> Offsets:
    journal = Journal(str(config.parent / "labels"), TOPIC)
    journal.look()
    return journal.settled.offsets


def test_every_message_is_labelled_once_and_a_second_job_asks_nobody(broker: str, config: Path) -> None:
    out = config.parent / "labels"
    sent = rows(300)
    send(broker, TOPIC, sent[:200])
    state = label(broker, config)
    assert (state.labels, state.dead_letters, state.settled) == (200, 0, 200)
    assert len(asked(config.parent)) == 200
    assert label(broker, config).labels == 0
    assert len(asked(config.parent)) == 200
    before = {path: path.read_bytes() for path in out.glob("*.parquet")}
    send(broker, TOPIC, sent[200:])
    assert label(broker, config).labels == 100
    assert len(asked(config.parent)) == 300
    assert {path: path.read_bytes() for path in before} == before, "nothing committed is touched"

    table = labels_in(out)
    truth = {row["key"]: row["x"] for row in sent}
    assert sorted(table["example_id"].to_pylist()) == sorted(truth)
    said = decode(table, read_manifest(out).spec).logprobs
    np.testing.assert_allclose(said, right_logprobs([truth[key] for key in table["example_id"].to_pylist()]), atol=5e-3)
    places = set(zip(table["source_partition"].to_pylist(), table["source_offset"].to_pylist(), strict=True))
    assert len(places) == 300
    assert {(p, o) for p, a, b in settled(config) for o in range(a, b + 1)} == places


def test_a_plan_counts_what_has_no_label_and_asks_nobody(broker: str, config: Path) -> None:
    def plan(**options: Any) -> str:
        settings = load_any_config(config)
        assert isinstance(settings, LabelConfig)
        return StreamJob(settings, settings_of(broker, config, **options), FLAGS).plan()

    sent = rows(90)
    send(broker, TOPIC, sent[:50])
    assert " 50 message(s) that the topic has now" in plan()
    assert asked(config.parent) == []
    assert not (config.parent / "labels").exists()
    label(broker, config)
    send(broker, TOPIC, sent[50:])
    assert " 40 message(s) that the topic has now" in plan()
    assert len(asked(config.parent)) == 50
    with pytest.raises(ValueError, match="schema"):  # what the job refuses at its start the plan refuses too
        plan(schema="key:string")


def test_what_an_entry_does_not_hold_any_more_is_asked_again_and_nothing_else(broker: str, config: Path) -> None:
    out = config.parent / "labels"
    now = int(time.time() * 1000)
    for i, row in enumerate(rows(120)):  # four windows
        send(broker, TOPIC, [row], timestamp=now - 4_000 + 1_000 * (i // 30), partition=i % 4)
    label(broker, config)
    entries = read_manifest(out).entries
    assert len(entries) >= 4
    lost = entries[1]
    before = pq.read_table(out / lost.path)
    (out / lost.path).unlink()
    (out / "_manifest" / f"{lost.key}.json").unlink()
    times_asked = len(asked(config.parent))
    config.write_text(tomli_w.dumps(config_of(config.parent) | {"engine": {"teacher_batch": 7}}))
    assert label(broker, config).labels == lost.rows
    assert len(asked(config.parent)) == times_asked + lost.rows
    assert [entry.key for entry in read_manifest(out).entries] == [entry.key for entry in entries], (
        "the same rows, the same name, whatever batches they came in"
    )
    assert pq.read_table(out / lost.path).equals(before)


@pytest.mark.parametrize(  # the pane's number, or a hash of other names
    "former",
    [
        pytest.param("", marks=pytest.mark.exhaustive),
        pytest.param("-1", marks=pytest.mark.exhaustive),
        "-0123456789abcdef",
    ],
)
def test_a_dataset_whose_panes_have_names_of_former_versions_goes_on(broker: str, config: Path, former: str) -> None:
    out, sent = config.parent / "labels", rows(100)
    first_ms = int(time.time() // 60 * 60_000) - 120_000

    def send_in_two_windows(some: list[dict[str, Any]]) -> None:
        for i, row in enumerate(some):
            send(broker, TOPIC, [row], timestamp=first_ms + 60_000 * (i % 2), partition=i % 4)

    send_in_two_windows(sent[:60])
    label(broker, config, window_s=60.0)
    for entry in read_manifest(out).entries:
        name = entry.key.rpartition("-")[0] + former
        (out / entry.path).rename(out / f"{name}.parquet")
        record = out / "_manifest" / f"{entry.key}.json"
        (out / "_manifest" / f"{name}.json").write_text(record.read_text().replace(entry.key, name))
        record.unlink()
    before = {path: path.read_bytes() for path in out.rglob("window=*")}
    assert len(before) == 4
    send_in_two_windows(sent[60:])
    assert label(broker, config, window_s=60.0).labels == 40
    assert len(asked(config.parent)) == 100
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(labels_in(out)["example_id"].to_pylist()) == sorted(row["key"] for row in sent)

    lost = next(path for path in before if path.suffix == ".json")
    lost.unlink()  # its shard is what a crash left behind
    assert label(broker, config, window_s=60.0).labels == 30
    assert sorted(labels_in(out)["example_id"].to_pylist()) == sorted(row["key"] for row in sent)


BAD = {
    "tombstone": (None, "the message has no value (a tombstone)"),
    "text": (b"{", "not JSON: "),
    "deep": (b"[" * 100_000, "not JSON that can be read: it is nested too deep"),
    "surrogate": (b'{"key": "\\ud800", "x": [1, 2, 3, 4]}', "key must be string, got '\\ud800'"),
    "no key": (b'{"x": [1, 2, 3, 4]}', "key is missing"),
    "digits": (b'{"key": "a", "x": [1' + b"0" * 400 + b", 2, 3, 4]}", "x must be float32 [4], got [1000"),
    "list": (b'[{"key": "a", "x": [1, 2, 3, 4]}]', "must be a JSON object, got list"),
    "msgpack": (b"\x82\xa3key\xa1a\xa1x\x94\x01\x02\x03\x04", "not JSON: "),
    "avro": (b"\x00\x00\x00\x00\x07\x02a", "not JSON: "),
    "shape": (b'{"key": "a", "x": [[1, 2], [3, 4]]}', "x must be float32 [4], got [[1, 2], [3, 4]]"),
    "nan": (b'{"key": "nan", "x": [NaN, 1, 2, 3]}', "the teacher's logits must be finite, 1 of 3 are NaN or infinite"),
}


def test_refused_messages_are_dead_letters_with_all_that_is_known_of_them(broker: str, config: Path) -> None:
    good = rows(40)
    now = int(time.time() * 1000)
    send(broker, TOPIC, good[:20], partition=1)
    bad = [{"message": {"value": value, "key": name}} for name, (value, _) in BAD.items()]
    send(broker, TOPIC, bad, partition=1, timestamp=now)
    send(broker, TOPIC, good[20:], partition=1)
    state = label(broker, config)
    assert (state.labels, state.dead_letters) == (40, len(BAD))
    letters = letters_in(config.parent / "labels-deadletter")
    assert [letter["offset"] for letter in letters] == [*range(20, 20 + len(BAD))]
    for letter, (name, (value, reason)) in zip(letters, BAD.items(), strict=True):
        assert (letter["topic"], letter["partition"], letter["timestamp_ms"]) == (TOPIC, 1, now)
        assert (letter["key"], letter["value"]) == (name.encode(), value)
        assert letter["error"].startswith(reason)
        assert letter["stage"] == ("answer" if name == "nan" else "message")
    assert letters[-1]["example_id"] == "nan"
    times_asked = len(asked(config.parent))
    assert label(broker, config).settled == 0, "they are settled"
    assert len(asked(config.parent)) == times_asked


def test_dead_letters_are_asked_again_by_command(broker: str, config: Path) -> None:
    out, folder = config.parent / "labels", config.parent / "labels-deadletter"
    send(broker, TOPIC, [{"message": {"value": row, "headers": {"f": b"1"}}} for row in rows(20)], partition=1)
    send(broker, TOPIC, [b"{", None], partition=1)
    wrong = {"schema": f"{SCHEMA},f:string=header.g"}  # somebody wrote the wrong name of a header
    assert label(broker, config, **wrong).dead_letters == 22
    assert not asked(config.parent)

    def again() -> StreamState:
        settings = load_any_config(config)
        assert isinstance(settings, LabelConfig)
        given = StreamSettings(
            source=f"letters:{folder}", out=str(out), schema=f"{SCHEMA},f:string=header.f", window_s=1.0
        )
        return StreamJob(settings, given, FLAGS).run()

    state = again()
    assert (state.labels, state.dead_letters) == (20, 2)
    assert len(asked(config.parent)) == 20
    assert sorted(labels_in(out)["source_offset"].to_pylist()) == list(range(20))
    assert [letter["offset"] for letter in letters_in(folder)] == [20, 21]
    assert (again().labels, len(asked(config.parent))) == (0, 20), "what is still bad stays, under another name"
    assert [letter["offset"] for letter in letters_in(folder)] == [20, 21]
    assert label(broker, config).settled == 0
    for file in folder.glob("*.parquet"):
        file.unlink()
    with pytest.raises(ValueError, match="--source: there are no dead letters in"):
        again()


def test_a_stream_of_refused_messages_alone_is_settled_without_a_shard(broker: str, config: Path) -> None:
    send(broker, TOPIC, [b"{"] * 7, partition=0)
    state = label(broker, config)
    assert (state.labels, state.dead_letters) == (0, 7)
    assert not list((config.parent / "labels").glob("*.parquet"))
    assert list(settled(config)) == [(0, 0, 6)]
    assert label(broker, config).dead_letters == 0


def test_too_many_failures_end_the_job_and_the_next_goes_on_behind_them(broker: str, config: Path) -> None:
    send(broker, TOPIC, [b"{"] * 7, partition=0)
    with pytest.raises(
        RuntimeError, match=r"7 of 7 messages have no label, more than --max-failures 5; why, is in \S+-deadletter"
    ):
        label(broker, config, max_failures="5")
    send(broker, TOPIC, rows(3), partition=0)
    assert label(broker, config, max_failures="5").labels == 3


def test_where_reading_starts_and_ends(broker: str, config: Path) -> None:
    sent = rows(90)
    hour_ago = int(time.time() * 1000) - 3_600_000
    send(broker, TOPIC, sent[:30], partition=2, timestamp=hour_ago)
    assert label(broker, config, start="latest").labels == 0
    send(broker, TOPIC, sent[30:60], partition=2)
    assert label(broker, config).labels == 30, "what was passed over stays so"
    assert label(broker, config, start="earliest").labels == 30, "and is read when it is asked for"
    assert label(broker, config, start="earliest").labels == 0, "once"
    assert sorted(labels_in(config.parent / "labels")["example_id"].to_pylist()) == sorted(
        row["key"] for row in sent[:60]
    )


def test_the_messages_key_is_the_id_and_bytes_are_a_column(broker: str, tmp_path: Path) -> None:
    settings = config_of(tmp_path)
    settings["data"] = {"pool": "unused", "id": "name", "carry": ["kind"], "num_classes": CLASSES}
    config = tmp_path / "job.toml"
    config.write_text(tomli_w.dumps(settings))
    row = {"x": [1, 2, 3, 4]}
    send(broker, TOPIC, [{"message": {"value": row, "key": "k1", "headers": {"kind": b"cat"}}}])
    label(broker, config, id="key", schema="x:float32[4],kind:string=header.kind")
    table = labels_in(tmp_path / "labels")
    assert (table["example_id"].to_pylist(), table["kind"].to_pylist()) == (["k1"], ["cat"])


def test_event_time_is_a_columns_and_a_message_without_one_is_a_dead_letter(broker: str, config: Path) -> None:
    at = datetime(2026, 1, 31, 2, tzinfo=UTC).timestamp()
    sent = [{**row, "at": int((at + 10 * (i // 20)) * 1000)} for i, row in enumerate(rows(40))]
    send(broker, TOPIC, sent)
    send(broker, TOPIC, [{**rows(1, 2)[0], "at": "yesterday"}, rows(1, 3)[0], {**rows(1, 4)[0], "at": 10**400}])
    state = label(broker, config, schema=f"{SCHEMA},at:int64", event_time="at", window_s=10.0)
    entries = read_manifest(config.parent / "labels").entries
    assert {entry.extra["window"]: entry.rows for entry in entries} == {
        "20260131T020000Z-20260131T020010Z": 20,
        "20260131T020010Z-20260131T020020Z": 20,
    }
    assert state.dead_letters == 3
    assert {letter["error"][:40] for letter in letters_in(config.parent / "labels-deadletter")} == {
        "at must be milliseconds since 1970 (--ev"
    }
    assert settled(config).count == 43


def test_a_budget_is_spent_once_per_window_and_what_is_not_chosen_is_settled(broker: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    student = run(problem, base=tmp_path, until=("train", 0)) / "students" / "round=000"
    (tmp_path / "asked.log").unlink(missing_ok=True)
    settings = config_of(tmp_path) | {"watch": {"budget": 9, "student": str(student), "wrong_share": 0.1}}
    config = tmp_path / "job.toml"
    config.write_text(tomli_w.dumps(settings))
    minute = int(datetime(2026, 1, 31, 2, tzinfo=UTC).timestamp() * 1000)
    for i, row in enumerate(rows(60)):
        send(broker, TOPIC, [row], timestamp=minute + 10_000 * (i // 30), partition=i % 4)
    send(broker, TOPIC, [None], partition=0, timestamp=minute)
    state = label(broker, config, window_s=10.0)
    assert [(entry.rows, entry.extra["window"]) for entry in read_manifest(tmp_path / "labels").entries] == [
        (9, "20260131T020000Z-20260131T020010Z"),
        (9, "20260131T020010Z-20260131T020020Z"),
    ]
    assert (len(asked(tmp_path)), state.dead_letters) == (18, 1)
    assert settled(config).count == 61
    assert label(broker, config, window_s=10.0).settled == 0
    assert len(asked(tmp_path)) == 18


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"schema": "x:float32[4]"}, "--schema must have the column key of data.id, it has x"),
        ({"schema": "key:string"}, "--schema must have the column x of data.carry, it has key"),
        ({"event_time": "at"}, r"--event-time must be a column of --schema \(key, x\), got 'at'"),
        ({"format": "avro"}, "--definition or --registry must be given for --format avro, and not both"),
        ({"format": "avro", "definition": "nowhere.avsc"}, "--definition: there is no file nowhere.avsc"),
        ({"shards": 2}, None),
    ],
)
def test_columns_are_compared_with_the_configuration_before_anything_is_read(
    broker: str, config: Path, options: dict[str, Any], sentence: str | None
) -> None:
    send(broker, TOPIC, rows(3))
    if sentence is None:
        assert label(broker, config, **options).labels == 3
        return
    with pytest.raises(ValueError, match=sentence):
        label(broker, config, **options)
    assert not asked(config.parent)


def test_a_dataset_of_another_teacher_is_refused(broker: str, config: Path) -> None:
    send(broker, TOPIC, rows(3))
    label(broker, config)
    config.write_text(tomli_w.dumps(config_of(config.parent, delay_s=0.001)))
    with pytest.raises(
        ValueError, match=r"--out: the labels in \S+ are others than this job's; they differ in teacher .*"
    ):
        label(broker, config)
    assert len(asked(config.parent)) == 3


def test_a_broker_that_is_not_there_is_a_sentence(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("confluent_kafka", reason="needs the extra kafka")
    monkeypatch.setattr("distilbeam.pipelines.streaming.kafka_client.ANSWER_S", 1.0)
    with pytest.raises(
        ValueError, match=r"no Kafka broker answers at 127.0.0.1:1 within 1 s .*; check the address in --source"
    ):
        label("127.0.0.1:1", config)
    with pytest.raises(
        ValueError, match="--consumer: the Kafka client refuses its settings: No such configuration property"
    ):
        label("127.0.0.1:1", config, consumer=("nonsense=1",))


def test_a_dataset_that_another_job_works_on_is_refused(broker: str, config: Path) -> None:
    out = config.parent / "labels"
    send(broker, TOPIC, rows(3))
    with (
        store_of(out).hold(out, "--out", "--out"),
        pytest.raises(ValueError, match="is being worked on by process"),
    ):
        label(broker, config)
    assert not asked(config.parent)


def test_what_was_read_and_is_not_settled_is_found() -> None:
    reading = Reading(Topic("broker:9092", TOPIC), ((0, 5), (1, 0), (2, 3)))
    settled = Offsets({0: [(0, 9), (12, 20)], 1: [(0, 4)]})
    assert unsettled(reading, settled) == [(0, 10, 11)]
    assert unsettled(replace(reading, until=((0, 12), (1, 5), (2, 3))), settled) == [(0, 10, 11)]
    assert unsettled(replace(reading, until=((0, 10), (1, 5), (2, 3))), settled) == []


def test_the_state_in_the_text_of_prometheus() -> None:
    state = StreamState()
    window = "20260131T020000Z-20260131T020010Z"
    facts = {"rows": 3, "window": window, "dead": {"late": 2}, "offsets": {"0": [[0, 4]]}, "topic": TOPIC}
    state.add(facts)
    state.add({"rows": 0, "window": "20260131T020010Z-20260131T020030Z", "offsets": {}, "empty": True, "topic": TOPIC})
    state.lag = {0: 5}
    lines = state.exposition().splitlines()
    assert "distilbeam_stream_labels_total 3" in lines
    assert 'distilbeam_stream_dead_letters_total{stage="late"} 2' in lines
    assert 'distilbeam_stream_lag_messages{partition="0"} 5' in lines
    assert "distilbeam_stream_watermark_seconds 1769824830.0" in lines
    assert (state.to_json()["window"], state.to_json()["watermark"]) == ("20260131T020010Z", "20260131T020030Z")
    assert json.loads(json.dumps(state.to_json()))["settled"] == 5
