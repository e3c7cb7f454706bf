"""The streaming job on real Prism: what dies, what is late, what ends. Skipped, with the reason, where Prism is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tomli_w
from engines import (
    SCHEMA,
    Broker,
    labels_in,
    letters_in,
    mock_broker,
    require_prism,
    rows,
    send,
    stream,
    streaming,
    wait_for,
)
from problem import asked

from distilbeam.pipelines.streaming.journal import Journal
from distilbeam.pipelines.streaming.offsets import Offsets
from distilbeam.teacher.softlabels import read_manifest

TOPIC = "examples"
AGES_S = 10_000_000  # a window that does not close while a test runs
pytestmark = pytest.mark.slow


@pytest.fixture
def prism() -> Path:
    return require_prism()


@pytest.fixture
def mock() -> Iterator[str]:
    with mock_broker() as address:
        yield address


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Broker]:
    pytest.importorskip("confluent_kafka", reason="needs the extra kafka")
    broker = Broker(tmp_path / "broker")
    yield broker
    broker.kill()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    teacher = {
        "kind": "torch",
        "model": "logging_teacher:LoggingTeacher",
        "arguments": {"log": str(tmp_path / "asked.log")},
        "input": {"columns": ["x"]},
    }
    path = tmp_path / "job.toml"
    data = {"pool": "unused", "id": "key", "carry": ["x"], "num_classes": 3}
    path.write_text(tomli_w.dumps({"data": data, "teacher": teacher}))
    return path


def options(address: str, config: Path, window_s: float = 2, *more: str) -> list[str]:
    source = ["--source", f"kafka:{address}:{TOPIC}", "--schema", SCHEMA, "--out", str(config.parent / "labels")]
    return [*source, "--window-s", str(window_s), *more]


def ids(config: Path) -> list[str]:
    return [str(key) for key in labels_in(config.parent / "labels")["example_id"].to_pylist()]


def end(process: subprocess.Popen[str]) -> None:
    """End a job as its user does, and see that it takes everything with it."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 0
    assert psutil.wait_procs(children, timeout=60)[1] == [], "nothing is left running"


def test_a_job_killed_twice_labels_every_message_once_and_asks_for_no_committed_label_again(
    mock: str, config: Path, prism: Path
) -> None:
    window_s, rate = 2, 150
    kills = []  # where the log of what was asked ended, and what was committed
    with _sending(mock, rows(20_000), rate) as sent:
        for _ in range(2):
            there = len(ids(config))
            with streaming(config, *options(mock, config, window_s), prism=prism) as process:
                wait_for(lambda there=there: len(ids(config)) >= there + rate, process=process)
                children = psutil.Process(process.pid).children(recursive=True)
                assert children, "Prism is one"
                process.kill()
                process.wait()
                assert psutil.wait_procs(children, timeout=60)[1] == [], "a killed job leaves no Prism"
            kills.append((len(asked(config.parent)), set(ids(config))))
    with streaming(config, *options(mock, config, window_s), prism=prism) as process:
        wait_for(lambda: len(ids(config)) >= len(sent), process=process)
        end(process)
    assert sorted(ids(config)) == sorted(row["key"] for row in sent)
    key_of = {np.array(row["x"], np.float32).tobytes().hex(): row["key"] for row in sent}
    assert len(key_of) == len(sent), "what was asked tells the message"
    for place, committed in kills:
        assert not committed & {key_of[row] for row in asked(config.parent)[place:]}


def test_sigterm_and_drain_commit_what_was_asked(mock: str, config: Path, prism: Path) -> None:
    sent = rows(80)
    send(mock, TOPIC, sent[:40])
    with streaming(config, *options(mock, config, AGES_S), prism=prism) as process:
        wait_for(lambda: len(asked(config.parent)) == 40)
        assert not ids(config), "its window is open"
        end(process)
    assert len(ids(config)) == 40
    send(mock, TOPIC, sent[40:])
    with streaming(config, *options(mock, config, AGES_S), prism=prism) as process:
        wait_for(lambda: len(asked(config.parent)) == 80)
        drained = stream(config, "--out", str(config.parent / "labels"), "--drain")
        assert drained.returncode == 0
        assert process.wait(300) == 0
    assert sorted(ids(config)) == sorted(row["key"] for row in sent)
    assert len(asked(config.parent)) == 80


def test_an_engine_that_dies_is_started_again_for_what_is_left(mock: str, config: Path, prism: Path) -> None:
    sent = rows(200)
    send(mock, TOPIC, sent[:100])
    with streaming(config, *options(mock, config), prism=prism) as process:
        wait_for(lambda: len(ids(config)) == 100)
        (engine,) = psutil.Process(process.pid).children()
        os.kill(engine.pid, signal.SIGKILL)
        send(mock, TOPIC, sent[100:])
        wait_for(lambda: len(ids(config)) == 200)
        end(process)
    assert sorted(ids(config)) == sorted(row["key"] for row in sent)
    assert "Traceback" in (config.parent / "labels" / "_stream" / "engine.log").read_text()


def test_an_engine_that_dies_at_once_is_given_up_in_one_sentence(mock: str, config: Path, tmp_path: Path) -> None:
    broken = tmp_path / "prism"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    send(mock, TOPIC, rows(3))
    done = stream(config, *options(mock, config), prism=broken)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert "error: Prism did not start; its lines are in" in done.stderr


def test_late_messages_are_labelled_within_the_lateness_and_never_asked_about_after_it(
    mock: str, config: Path, prism: Path
) -> None:
    sent = rows(150)
    now = int(time.time() * 1000)
    dead = config.parent / "labels-deadletter"
    with streaming(config, *options(mock, config, 2, "--allowed-lateness-s", "600"), prism=prism) as process:
        send(mock, TOPIC, sent[:50], timestamp=now)
        wait_for(lambda: len(ids(config)) == 50)
        send(mock, TOPIC, sent[50:100], timestamp=now - 10_000)
        send(mock, TOPIC, sent[100:], timestamp=now - 3_600_000)
        wait_for(lambda: len(ids(config)) == 100 and len(letters_in(dead)) == 50)
        end(process)
    assert sorted(ids(config)) == sorted(row["key"] for row in sent[:100])
    assert len(asked(config.parent)) == 100
    assert {letter["stage"] for letter in letters_in(dead)} == {"late"}
    journal = Journal(str(config.parent / "labels"), TOPIC)
    journal.look()
    assert journal.settled.offsets.count == 150


def test_an_idle_partition_and_a_message_of_the_future_hold_nobody_back(mock: str, config: Path, prism: Path) -> None:
    sent = rows(60)
    with streaming(config, *options(mock, config), prism=prism) as process:
        send(mock, TOPIC, sent[:1], partition=0, timestamp=int((time.time() + 86_400) * 1000))
        send(mock, TOPIC, sent[1:30], partition=0)
        wait_for(lambda: len(ids(config)) == 30)
        send(mock, TOPIC, sent[30:], partition=3)
        wait_for(lambda: len(ids(config)) == 60)
        end(process)
    assert not (config.parent / "labels-deadletter").exists()


def test_windows_without_a_message_leave_an_entry(mock: str, config: Path, prism: Path) -> None:
    window_s, now = 2, time.time()
    sent = rows(20)
    records = config.parent / "labels" / "_stream"

    def empty() -> list[tuple[float, float]]:
        names = [json.loads(file.read_text())["window"].split("-") for file in records.glob("empty=*.json")]
        return sorted((_seconds(start), _seconds(end)) for start, end in names)

    with streaming(config, *options(mock, config, window_s), prism=prism) as process:
        send(mock, TOPIC, sent[:10], timestamp=int((now - 120) * 1000))
        wait_for(lambda: len(ids(config)) == 10 and empty(), process=process)
        end(process)
    first = (now - 120) // window_s * window_s
    assert min(empty())[0] == first + window_s, "they begin behind the window that has messages"
    before = max(end for _, end in empty())
    with streaming(config, *options(mock, config, window_s), prism=prism) as process:
        send(mock, TOPIC, sent[10:])
        wait_for(lambda: len(ids(config)) == 20 and max(end for _, end in empty()) > before, process=process)
        end(process)
    covered = empty() + [
        (_seconds(start), _seconds(end))
        for start, end in (
            entry.extra["window"].split("-") for entry in read_manifest(config.parent / "labels").entries
        )
    ]
    covered = sorted(set(covered))
    assert covered[0][0] == first
    assert all(end == start for (_, end), (start, _) in pairwise(covered)), "every window has an entry, and one"


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def test_a_window_of_many_rows_is_written_in_panes_before_it_closes(mock: str, config: Path, prism: Path) -> None:
    sent = rows(1_500)
    send(mock, TOPIC, sent)
    with streaming(config, *options(mock, config, AGES_S, "--max-rows", "512"), prism=prism) as process:
        wait_for(lambda: len(ids(config)) >= 1_024)
        end(process)
    assert sorted(ids(config)) == sorted(row["key"] for row in sent)
    assert len(read_manifest(config.parent / "labels").entries) >= 3


def test_a_job_that_cannot_begin_says_so_in_a_sentence(real: Broker, config: Path) -> None:
    def refused(*more: str) -> str:
        done = stream(config, *options(real.address, config, 2, "--until", "latest", *more))
        assert done.returncode == 2
        assert "Traceback" not in done.stderr + done.stdout
        return " ".join(done.stderr.split())

    assert f"error: topic {TOPIC} at {real.address} cannot be read: " in refused()
    real.make_topic(TOPIC, 2)
    send(real.address, TOPIC, rows(3))
    assert "error: --schema must have the column x of teacher.input.columns, it has key" in refused(
        "--schema", "key:string", "--set", "data.carry=[]"
    )
    assert "error: --window-s: must be greater than or equal to 0.1, got 0.0 --start: must be" in refused(
        "--window-s", "0", "--start", "newest"
    )
    assert not asked(config.parent)
    assert not (config.parent / "labels").exists()


@pytest.mark.slow
@pytest.mark.exhaustive  # a broker is away for a minute; make test-prism runs it
def test_real_topics_grow_abort_transactions_and_lose_their_broker(real: Broker, config: Path, prism: Path) -> None:
    from confluent_kafka import Producer
    from confluent_kafka.admin import AdminClient, NewPartitions

    real.make_topic(TOPIC, 2)
    sent = rows(400)
    with streaming(config, *options(real.address, config, 2, "--consumer", "group.id=monitor"), prism=prism) as process:
        send(real.address, TOPIC, sent[:100])
        producer = Producer({"bootstrap.servers": real.address, "transactional.id": "t", "log_level": 0})
        producer.init_transactions()
        for rows_, ending in ((sent[100:150], producer.commit_transaction), (sent[350:], producer.abort_transaction)):
            producer.begin_transaction()
            for row in rows_:
                producer.produce(TOPIC, json.dumps(row).encode())
            producer.flush()
            ending()
        wait_for(lambda: len(ids(config)) == 150)

        real.kill()
        time.sleep(60)
        real.start()
        send(real.address, TOPIC, sent[150:250])
        wait_for(lambda: len(ids(config)) == 250)

        admin = AdminClient({"bootstrap.servers": real.address})
        admin.create_partitions([NewPartitions(TOPIC, 4)])[TOPIC].result(30)
        time.sleep(1)
        for partition in (2, 3):
            send(
                real.address, TOPIC, sent[250 + 50 * (partition - 2) : 300 + 50 * (partition - 2)], partition=partition
            )
        wait_for(lambda: len(ids(config)) == 350)
        end(process)
    assert sorted(ids(config)) == sorted(row["key"] for row in sent[:350]), (
        "those of the aborted transaction are not there"
    )
    assert len(asked(config.parent)) == 350
    assert _told(real.address) == _behind_settled(config)


@pytest.mark.exhaustive  # half a minute of waiting for the broker's cleaner; make test-prism runs it
def test_messages_that_compaction_removed_are_settled_without_being_there(
    real: Broker, config: Path, prism: Path
) -> None:
    real.make_topic(TOPIC, 1, **{"cleanup.policy": "compact", "segment.ms": "200", "min.cleanable.dirty.ratio": "0.01"})
    sent = rows(60)
    for start in range(0, 60, 20):  # every other key comes again; the last segment is never compacted
        keys = [str(number if number % 2 else number + start) for number in range(20)]
        values = sent[start : start + 20]
        keyed = [{"message": {"value": row, "key": key}} for row, key in zip(values, keys, strict=True)]
        send(real.address, TOPIC, keyed)
        time.sleep(0.5)
    wait_for(lambda: len(_offsets(real.address)) < 60)
    left = _offsets(real.address)
    assert left != list(range(left[0], 60)), "there are gaps between messages"
    arguments = options(real.address, config, 2, "--until", "latest", "--start", "earliest")
    done = stream(config, *arguments, prism=prism)
    assert done.returncode == 0, done.stderr
    assert sorted(ids(config)) == sorted(sent[offset]["key"] for offset in left)
    assert _behind_settled(config) == {0: 60}
    again = stream(config, *arguments[:-2], prism=prism)  # goes on, where there is nothing more
    assert again.returncode == 0, again.stderr
    assert len(asked(config.parent)) == len(left)


def _offsets(address: str) -> list[int]:
    """Read a topic of one partition from its beginning; give the offsets of what is there."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({"bootstrap.servers": address, "group.id": "reader", "enable.auto.commit": False})
    consumer.assign([TopicPartition(TOPIC, 0, 0)])
    _, end_ = consumer.get_watermark_offsets(TopicPartition(TOPIC, 0), timeout=10)
    found: list[int] = []
    while not found or found[-1] < end_ - 1:
        found += [message.offset() for message in consumer.consume(100, 1.0)]
    consumer.close()
    return found


def _told(address: str) -> dict[int, int]:
    """Return the offsets that the consumer group was told, where it was told any."""
    from confluent_kafka import Consumer, TopicPartition

    consumer = Consumer({"bootstrap.servers": address, "group.id": "monitor"})
    found = consumer.committed([TopicPartition(TOPIC, p) for p in range(4)], timeout=10)
    consumer.close()
    return {part.partition: part.offset for part in found if part.offset >= 0}


def _behind_settled(config: Path) -> dict[int, int]:
    journal = Journal(str(config.parent / "labels"), TOPIC)
    journal.look()
    settled: Offsets = journal.settled.offsets
    return {p: settled.first_missing(p, 0) for p in range(4) if settled.first_missing(p, 0)}


@contextmanager
def _sending(address: str, rows_: list[dict[str, Any]], rate: int) -> Iterator[list[dict[str, Any]]]:
    """Send rows at a rate while the block runs; yield the list of those that were sent."""
    sent: list[dict[str, Any]] = []
    stop = threading.Event()

    def work() -> None:
        for i in range(0, len(rows_), 10):
            if stop.wait(10 / rate):
                return
            send(address, TOPIC, rows_[i : i + 10])
            sent.extend(rows_[i : i + 10])

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield sent
    finally:
        stop.set()
        thread.join()
