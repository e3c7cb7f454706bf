"""What is known of a topic while it is read: a consumer, where each partition stands, how far its time has come.

All of it may be lost at any time: a reader that is made anew begins at the positions that the runner has kept.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distilbeam.pipelines.streaming.kafka_client import Topic
from distilbeam.pipelines.streaming.message import Message
from distilbeam.pipelines.streaming.offsets import Offsets
from distilbeam.pipelines.streaming.stop_file import stop_wanted

log = logging.getLogger("distilbeam.stream")

POLL_S = 0.1
_REFRESH_S = 10.0  # between two looks for new partitions
_IDLE_CHECK_S = 0.5  # between two questions about the end of a partition that seems idle
_AHEAD_WINDOWS = 4  # windows that a partition may be ahead of the slowest one: what is open is held in memory
_readers: dict[str, Reader] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Reading:
    """How a topic is read.

    Attributes:
      topic: the topic.
      start: by partition, the first offset to read; a partition that is added later is read from its beginning.
      settled: intervals (partition, first, last) that are passed over.
      until: by partition, the offset at which reading ends; None reads until it is told to stop.
      window_s: length of a window in seconds.
      lateness_s: how long after its window's end a message is still taken, in event time.
      idle_s: how far behind the clock the time of an idle partition is.
      batch_rows: most messages of a batch.
      max_wait_s: seconds that messages wait for their batch to fill.
      stop_folder: folder whose file `stop` ends the reading.
    """

    topic: Topic
    start: tuple[tuple[int, int], ...]
    settled: tuple[tuple[int, int, int], ...] = ()
    until: tuple[tuple[int, int], ...] | None = None
    window_s: float = 60.0
    lateness_s: float = 0.0
    idle_s: float = 2.0
    batch_rows: int = 256
    max_wait_s: float = 1.0
    stop_folder: str | None = None


def event_time_s(message: Message) -> float:
    """Return a message's time in seconds since 1970, the clock's where it has none or one that is yet to come."""
    now = time.time()
    return min(message.timestamp_ms / 1000, now) if message.timestamp_ms >= 0 else now


class Reader:
    """A consumer and what is known of its partitions.

    Args:
      reading: how to read.
      positions: by partition, the next offset that no batch covers.
    """

    def __init__(self, reading: Reading, positions: dict[int, int]) -> None:
        from confluent_kafka import Consumer

        self.reading, self.topic = reading, reading.topic
        self.positions = dict(positions)
        self.settled = Offsets()
        for partition, first, last in reading.settled:
            self.settled.add(partition, first, last)
        self.until = None if reading.until is None else dict(reading.until)
        self.watermark_s = -float("inf")
        self.ended = False
        self._fetched = dict(positions)  # the next offset to come from the broker
        self._newest: dict[int, float] = {}
        self._idle: dict[int, float] = {}  # when the broker said that there is no more
        self._at_end: set[int] = set()
        self._paused: set[int] = set()
        self._refreshed = self._asked = time.monotonic()
        self._stop_looked = 0.0
        self.consumer: Any = Consumer(self.topic.consumer_settings(), logger=log)
        self._assign()

    def _assign(self) -> None:
        self._paused.clear()
        self.consumer.assign([self._place(partition, offset) for partition, offset in self._fetched.items()])

    def _place(self, partition: int, offset: int | None = None) -> Any:
        from confluent_kafka import TopicPartition

        if offset is None:
            return TopicPartition(self.topic.name, partition)
        return TopicPartition(self.topic.name, partition, offset)

    def poll(self) -> Iterator[tuple[Message, int]]:
        """Fetch messages; give those to label, each with the first offset that is settled with it."""
        self._look_for_partitions()
        for raw in self.consumer.consume(self.reading.batch_rows, POLL_S):
            if raw.error() is not None:
                self._heard(raw)
                continue
            partition, offset = raw.partition(), raw.offset()
            if self.until is not None and offset >= self.until.get(partition, 0):
                self._pause({partition})
                self._at_end.add(partition)
                continue
            if offset < self._fetched[partition]:  # of a fetch that began before a seek
                continue
            self._fetched[partition] = offset + 1
            self._at_end.discard(partition)
            self._idle.pop(partition, None)
            message = Message(partition, offset, raw.timestamp()[1], raw.key(), raw.value(), tuple(raw.headers() or ()))
            self._newest[partition] = max(self._newest.get(partition, 0.0), event_time_s(message))
            if (partition, offset) in self.settled:
                continue
            since = self.positions[partition]  # between them lies what is settled, or nothing: compaction, transactions
            self.positions[partition] = offset + 1
            yield message, since

    def _heard(self, raw: Any) -> None:
        from confluent_kafka import KafkaError

        error, partition = raw.error(), raw.partition()
        if error.code() == KafkaError._PARTITION_EOF:
            self._fetched[partition] = max(self._fetched.get(partition, 0), raw.offset())
            self._at_end.add(partition)
            return
        gone = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)
        refused = (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.GROUP_AUTHORIZATION_FAILED)
        if error.fatal() or error.code() in (*gone, *refused):
            raise RuntimeError(f"topic {self.topic.name} cannot be read any more: {error.str()}")
        log.warning("topic %s: %s; reading goes on when it answers", self.topic.name, error.str())

    def forget(self) -> None:
        """Drop what was fetched but not claimed."""
        self.close()

    def close(self) -> None:
        """Close the consumer; the reader is not to be used again."""
        if self.consumer is not None:
            self.consumer.close()
            self.consumer = None

    def told_to_stop(self) -> bool:
        """Tell whether the reading is to end, looking at most once a second."""
        if self.reading.stop_folder is None or time.monotonic() - self._stop_looked < 1:
            return False
        self._stop_looked = time.monotonic()
        return stop_wanted(self.reading.stop_folder)

    def check_ends(self) -> None:
        """Find out which partitions have nothing left to read, by asking their brokers; end where all are read."""
        if self.until is not None:
            self.ended = all(p in self._at_end or self._fetched.get(p, 0) >= end for p, end in self.until.items())
        if self.consumer is None or time.monotonic() - self._asked < _IDLE_CHECK_S:
            return
        self._asked = time.monotonic()
        for partition in self._at_end - self._paused:
            now = time.time()
            end = self._end_of(partition)
            if end is not None and self._fetched[partition] >= end:
                self._idle[partition] = now
        self._keep_together()

    def _end_of(self, partition: int) -> int | None:
        """Ask for a partition's end, what a transaction holds back left out; None where nobody answers."""
        from confluent_kafka import KafkaException

        try:
            _, end = self.consumer.get_watermark_offsets(self._place(partition), timeout=1.0, cached=False)
        except KafkaException:
            return None
        return int(end)

    def new_watermark(self) -> float:
        """Return the time, in seconds, before which no partition has a message left; -inf where one is not known yet."""
        marks = []
        for partition in self._fetched:
            newest = self._newest.get(partition, -float("inf"))
            idle = self._idle.get(partition, -float("inf")) - self.reading.idle_s
            if self.until is not None and partition in self._at_end:
                idle = time.time() - self.reading.idle_s
            marks.append(max(newest, idle))
        return min(marks, default=-float("inf"))

    def _keep_together(self) -> None:
        """Let partitions that are far ahead of the slowest one wait: their windows cannot close before it has come."""
        known = {p: t for p, t in self._newest.items() if p not in self._at_end}
        slowest = min((self._newest.get(p, -float("inf")) for p in self._fetched if p not in self._at_end), default=0.0)
        ahead = {p for p, t in known.items() if t > slowest + _AHEAD_WINDOWS * self.reading.window_s}
        if len(self._fetched) > 1:
            self._pause(ahead - self._paused)
            self._resume({p for p in self._paused - ahead if p not in self._at_end})

    def _pause(self, partitions: set[int]) -> None:
        if partitions - self._paused:
            self.consumer.pause([self._place(p) for p in partitions - self._paused])
            self._paused |= partitions

    def _resume(self, partitions: set[int]) -> None:
        if partitions:
            self.consumer.resume([self._place(p) for p in partitions])
            self._paused -= partitions

    def _look_for_partitions(self) -> None:
        from confluent_kafka import KafkaException

        if self.until is not None or time.monotonic() - self._refreshed < _REFRESH_S:
            return
        self._refreshed = time.monotonic()
        try:
            found = self.consumer.list_topics(self.topic.name, timeout=1.0).topics[self.topic.name]
        except KafkaException:
            return
        added = sorted(set(found.partitions) - set(self._fetched))
        if added:
            log.warning("topic %s has %d more partition(s): %s", self.topic.name, len(added), added)
            self._fetched |= dict.fromkeys(added, 0)
            self.positions |= dict.fromkeys(added, 0)
            self.consumer.incremental_assign([self._place(p, 0) for p in added])


def take_reader(reading: Reading, positions: dict[int, int]) -> Reader:
    """Return the reader that stands at the positions, a new one where there is none."""
    with _lock:
        reader = _readers.pop(_name(reading), None)
    if reader is not None and reader.consumer is not None:
        # partitions that were found and of which nothing was claimed yet are not in the restriction
        if all(positions.get(p, 0) == offset for p, offset in reader.positions.items()):
            return reader
        reader.close()
    return Reader(reading, positions)


def put_back(reading: Reading, reader: Reader) -> None:
    with _lock:
        if reader.consumer is not None:
            _readers[_name(reading)] = reader


def _name(reading: Reading) -> str:
    return f"{reading.topic.brokers} {reading.topic.name} {reading.stop_folder} {hash(reading)}"


def close_readers() -> None:
    """Close the consumers of this process, of jobs that have ended."""
    with _lock:
        while _readers:
            _readers.popitem()[1].close()
