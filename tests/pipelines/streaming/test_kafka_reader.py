"""Reading a topic: partitions that lie far apart, where partitions end, which windows were empty."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from engines import mock_broker, rows, send, wait_for

from distilbeam.pipelines.streaming import kafka_reader
from distilbeam.pipelines.streaming.kafka_client import Topic
from distilbeam.pipelines.streaming.kafka_ends import Ends
from distilbeam.pipelines.streaming.kafka_read import _Gather
from distilbeam.pipelines.streaming.kafka_reader import Reader, Reading
from distilbeam.pipelines.streaming.message import Message

TOPIC = "examples"


@pytest.fixture
def broker() -> Iterator[str]:
    with mock_broker() as address:
        yield address


@pytest.fixture
def alone() -> Iterator[Reader]:
    """A reader of a partition that never hears from its broker."""
    pytest.importorskip("confluent_kafka", reason="needs the extra kafka")
    reader = Reader(Reading(Topic("127.0.0.1:1", TOPIC), ((0, 0),), window_s=10.0), {0: 0})
    yield reader
    reader.close()


def test_partitions_that_are_far_ahead_wait_and_everything_is_read(
    broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_reader, "_AHEAD_BYTES", 2_000)
    values, hour_ago = rows(600), int(time.time() * 1000) - 3_600_000
    for partition in (0, 1):  # one after the other, so that they are fetched far apart
        for start in range(0, 600, 100):
            send(broker, TOPIC, values[start : start + 100], partition=partition, timestamp=hour_ago + 5_000 * start)
    reader = Reader(Reading(Topic(broker, TOPIC), ((0, 0), (1, 0)), window_s=1.0, batch_rows=32), {0: 0, 1: 0})
    read: list[Message] = []
    waited = False

    def all_read() -> bool:
        nonlocal waited
        read.extend(message for message, _, _ in reader.poll())
        reader.check_ends()
        waited = waited or bool(reader._paused)
        return len(read) >= 1_200

    wait_for(all_read)
    reader.close()
    assert waited
    for partition in (0, 1):
        assert [message.offset for message in read if message.partition == partition] == list(range(600))


def test_where_partitions_end_is_asked_without_waiting(broker: str) -> None:
    send(broker, TOPIC, rows(7), partition=2)
    ends = Ends(Topic(broker, TOPIC))
    before = time.time()
    assert ends.ask([0, 2])
    found: dict[int, tuple[int, float]] = {}

    def answered() -> bool:
        found.update(ends.answers())
        ends.ask([0, 2])  # asked again where an answer was "not known"; nothing while one is outstanding
        return set(found) == {0, 2}

    wait_for(answered)
    assert {partition: end for partition, (end, _) in found.items()} == {0: 0, 2: 7}
    assert all(before <= asked_s <= time.time() for _, asked_s in found.values())
    nobody = Ends(Topic("127.0.0.1:1", TOPIC))
    assert nobody.ask([0])
    assert not nobody.ask([0]), "one question at a time"
    assert nobody.answers() == {}


class _Answer:
    """What a broker told of a partition."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def done(self) -> bool:
        return True

    def exception(self) -> None:
        return None

    def result(self) -> _Answer:
        return self


def test_an_end_that_the_broker_does_not_know_yet_is_no_end() -> None:
    ends = Ends(Topic("127.0.0.1:1", TOPIC))
    ends._pending = {0: _Answer(-1001), 2: _Answer(7)}
    assert {partition: end for partition, (end, _) in ends.answers().items()} == {2: 7}
    assert ends.answers() == {}, "an answer is told once"


@pytest.mark.parametrize(
    ("known_s", "filled", "marks", "spans"),
    [
        (0, [3, 4], [(42, [])], []),  # nothing is known of what was before
        (0, [3, 6], [(75, [])], [(40, 60)]),
        (0, [3], [(42, []), (99, []), (109, [])], [(40, 100)]),  # a quiet minute is told at once
        (0, [3], [(42, [8]), (95, [])], [(40, 80)]),
        (200, [23], [(245, [])], [(200, 230)]),  # what was committed says from where
        (200, [], [(86_400, [])], [(200, 86_400)]),
    ],
)
def test_windows_without_a_message_are_told_once(
    alone: Reader, known_s: float, filled: list[int], marks: list[tuple[float, list[int]]], spans: list[tuple[int, int]]
) -> None:
    alone.reading = Reading(alone.reading.topic, ((0, 0),), window_s=10.0, closed_s=float(known_s))
    alone._filled = set(filled)
    told = []
    for mark, more in marks:
        told += alone.empty_windows(mark)
        alone._filled |= set(more)
    assert told == spans
    assert alone.empty_windows(marks[-1][0]) == []


def test_a_reader_that_takes_over_tells_nothing_of_what_it_has_not_seen(alone: Reader) -> None:
    alone.watermark_s = 35.0
    assert alone.empty_windows(42.0) == []
    assert alone.empty_windows(109.0) == []
    assert alone.empty_windows(110.0) == [(50, 110)]


def test_batches_cover_what_lies_between_their_messages() -> None:
    gather = _Gather(Reading(Topic("b:1", TOPIC), ((0, 0),), window_s=10.0, lateness_s=5.0, batch_rows=3))

    def message(partition: int, offset: int) -> Message:
        return Message(partition, offset, 0, None, b"")

    came = [
        (message(0, 4), 2, 12.0),  # 2 and 3 hold nothing
        (message(1, 0), 0, 13.0),
        (message(0, 5), 5, 21.0),  # of another window
        (message(0, 6), 6, 19.0),
    ]
    ((batch, time_s),) = gather.add(came, 0.0)
    assert batch.covers == ((0, 2, 4), (0, 6, 6), (1, 0, 0))
    assert time_s == 12.0
    assert list(gather.add([(message(0, 7), 7, 14.9)], 25.0)) == []
    assert [(each.covers, each.late) for each, _ in gather.rest()] == [(((0, 5, 5),), False), (((0, 7, 7),), True)]
