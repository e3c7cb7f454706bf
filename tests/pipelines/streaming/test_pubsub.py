"""Pub/Sub on real Prism, from a server of its protocol: one label for every message, however often it is delivered."""

from __future__ import annotations

import json
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from engines import SCHEMA, labels_in, letters_in, require_prism, rows, stream, streaming, wait_for
from problem import asked
from pubsub_server import ADDRESS, PubsubServer, Subscription, publish, pubsub

from distilbeam.pipelines.streaming.pubsub_reader import PubsubReader, PubsubReading, require_subscription
from distilbeam.pipelines.streaming.state import StreamState
from distilbeam.student.checkpoint import save_student
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.teacher.softlabels import read_manifest

TOPIC, NAME = "projects/p/topics/examples", "projects/p/subscriptions/labels"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[PubsubServer]:
    with pubsub() as found:
        monkeypatch.setenv(ADDRESS, found.address)
        found.subscriptions[NAME] = Subscription(TOPIC)
        yield found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    model = {"model": "logging_teacher:LoggingTeacher", "arguments": {"log": str(tmp_path / "asked.log")}}
    teacher = {"kind": "torch", **model, "input": {"columns": ["x"]}}
    path = tmp_path / "job.toml"
    data = {"pool": "unused", "id": "key", "carry": ["x"], "num_classes": 3}
    path.write_text(tomli_w.dumps({"data": data, "teacher": teacher}))
    return path


def options(config: Path, window_s: float = 1, *more: str) -> list[str]:
    place = ["--source", f"pubsub:{NAME}", "--schema", SCHEMA, "--out", str(config.parent / "labels")]
    return [*place, "--window-s", str(window_s), *more]


def encoded(sent: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(row).encode() for row in sent]


def labels(config: Path) -> list[str]:
    return [str(key) for key in labels_in(config.parent / "labels")["example_id"].to_pylist()]


def acknowledged(server: PubsubServer) -> int:
    return sum(kept.acknowledged for kept in server.subscriptions[NAME].kept.values())


@pytest.mark.slow
def test_every_message_has_one_label_and_is_acknowledged_when_that_is_committed(
    server: PubsubServer, config: Path
) -> None:
    prism, sent = require_prism(), rows(300)
    server.again_every = 3  # these come twice at once
    ids = publish(TOPIC, encoded(sent[:100]))
    with streaming(config, *options(config), prism=prism) as process:
        wait_for(lambda: acknowledged(server) == 100, process=process)
        assert len(labels(config)) == 100
        server.deliver_again(NAME)  # the acknowledgements have not arrived, as it were
        ids += publish(TOPIC, encoded(sent[100:]))
        refused = publish(TOPIC, [b"no JSON", b"no JSON", b'{"key": 1}'])
        wait_for(lambda: acknowledged(server) == 303, process=process)
        process.terminate()
        assert process.wait(60) == 0
    table = labels_in(config.parent / "labels")
    assert sorted(labels(config)) == sorted(row["key"] for row in sent)
    key_of = dict(zip(ids, (row["key"] for row in sent), strict=True))
    assert dict(zip(table["source_message"].to_pylist(), table["example_id"].to_pylist(), strict=True)) == key_of
    assert set(Counter(asked(config.parent)).values()) == {1}, "nobody was asked twice"
    dead = letters_in(config.parent / "labels-deadletter")
    assert sorted((letter["message_id"], letter["topic"]) for letter in dead) == sorted(
        (name, NAME) for name in refused
    )


@pytest.mark.slow
@pytest.mark.exhaustive  # a minute of waiting for leases to end; make test-prism runs it
def test_a_killed_job_goes_on_with_what_was_not_committed(server: PubsubServer, config: Path) -> None:
    prism, sent = require_prism(), rows(240)
    publish(TOPIC, encoded(sent[:80]))
    with streaming(config, *options(config), prism=prism) as process:
        wait_for(lambda: len(labels(config)) == 80, process=process)
    with streaming(config, *options(config, 3600), prism=prism) as process:
        publish(TOPIC, encoded(sent[80:160]))
        wait_for(lambda: len(asked(config.parent)) == 160, process=process)
        assert len(labels(config)) == 80, "their window is open"
        assert acknowledged(server) <= 80
        process.kill()
    server.end_leases(NAME)
    publish(TOPIC, encoded(sent[160:]))
    with streaming(config, *options(config), prism=prism) as process:
        wait_for(lambda: acknowledged(server) == 240, process=process)
        process.terminate()
        assert process.wait(60) == 0
    assert sorted(labels(config)) == sorted(row["key"] for row in sent)
    times = Counter(asked(config.parent))
    assert sorted(times.values()) == [1] * 160 + [2] * 80, "what was committed is not asked again"


@pytest.mark.slow
def test_a_budget_is_spent_on_each_window(server: PubsubServer, config: Path) -> None:

    student = StudentConfig(kind="mlp", hidden=(8,), input={"columns": ["x"]})
    save_student(config.parent / "student", build_student(student, (4,), 3), student, ["0", "1", "2"], (4,))
    watch = {"budget": 5, "student": str(config.parent / "student"), "wrong_share": 0.5}
    config.write_text(tomli_w.dumps({**tomllib.loads(config.read_text()), "watch": watch}))
    publish(TOPIC, encoded(rows(60)))
    with streaming(config, *options(config, 2), prism=require_prism()) as process:
        wait_for(lambda: acknowledged(server) == 60, process=process)
        process.terminate()
        assert process.wait(60) == 0
    windows = Counter(entry.extra["window"] for entry in read_manifest(config.parent / "labels").entries)
    assert set(windows.values()) == {1}
    assert len(labels(config)) == 5 * len(windows)


def test_a_subscription_that_cannot_be_read_is_said_in_a_sentence(server: PubsubServer, config: Path) -> None:
    with pytest.raises(ValueError, match=r"--source takes pubsub:projects/PROJECT/subscriptions/NAME, got 'pubsub:s'"):
        require_subscription("s")
    other = NAME + "2"
    with pytest.raises(ValueError, match=rf"--source: {other} cannot be read: 404 Resource not found"):
        require_subscription(other)
    publish(TOPIC, [b"{}"])
    require_subscription(NAME)
    (kept,) = server.subscriptions[NAME].kept.values()
    assert kept.deliveries == 1
    assert kept.due_s <= time.monotonic(), "given back"
    server.forbidden.add(NAME)
    program = config.parent / "prism"  # is not started
    program.touch(0o755)
    done = stream(config, *options(config), prism=program)
    assert done.returncode == 2
    assert f"error: --source: {NAME} cannot be read: 403 User not authorized" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr + done.stdout


def test_what_is_late_is_said_by_the_message_alone(server: PubsubServer, tmp_path: Path) -> None:
    from distilbeam.pipelines.streaming.decode import make_decoder

    clock = make_decoder("at:int64", "json", None, "", "at")
    reading = PubsubReading(NAME, str(tmp_path / "labels"), window_s=60, lateness_s=10, clock=clock)
    now = datetime.now(UTC).replace(second=30, microsecond=0) - timedelta(hours=1)
    times = [now, now - timedelta(seconds=60), now + timedelta(seconds=900), now - timedelta(days=50)]
    publish(TOPIC, [json.dumps({"at": int(at.timestamp() * 1000)}).encode() for at in times])
    for kept in server.subscriptions[NAME].kept.values():
        kept.message.publish_time = now
    reader, found = PubsubReader(reading), []
    wait_for(lambda: found.extend(reader.poll()) or len(found) == 4, 30)
    sent_s = now.timestamp()
    placed = {json.loads(each.message.value)["at"] // 1000: (each.time_s, each.late) for each in found}
    assert placed == {
        sent_s: (sent_s, False),
        sent_s - 60: (sent_s, True),  # its window ended at 0 s, with what is allowed at 10 s, and it was sent at 30 s
        sent_s + 900: (sent_s, False),  # what is yet to come was when it was sent
        sent_s - 50 * 86_400: (sent_s, True),
    }
    reader.close()
    wait_for(lambda: all(kept.due_s <= time.monotonic() for kept in server.subscriptions[NAME].kept.values()), 10)


def test_messages_with_ids_count_as_settled() -> None:
    state = StreamState()
    state.add({"rows": 3, "messages": 4, "dead": {"message": 1}, "window": ""})
    assert (state.settled, state.labels) == (4, 3)
