"""What is known of a topic while it is read: a consumer, where each partition stands, how far its time has come.

All of it may be lost at any time: a reader that is made anew begins at the positions that the runner has kept.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

from distilbeam.pipelines.streaming.decode import Decoder
from distilbeam.pipelines.streaming.kafka_client import Topic
from distilbeam.pipelines.streaming.kafka_ends import Ends
from distilbeam.pipelines.streaming.message import Message
from distilbeam.pipelines.streaming.offsets import Offsets
from distilbeam.pipelines.streaming.stop_file import stop_wanted

log = logging.getLogger("distilbeam.stream")

POLL_S = 0.1
_REFRESH_S = 10.0  # between two looks for new partitions
_IDLE_CHECK_S = 0.25  # between two questions about the ends of partitions that seem idle
_AHEAD_BYTES = 2**26  # that partitions may be ahead of the slowest one: windows that are open are held in memory
_QUIET_S = 60.0  # of windows without a message are told at once
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
      clock: says when a message's event was; None for the message's own time.
      closed_s: end of the latest window that is committed, from where on empty windows are told; 0 for none.
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
    clock: Decoder | None = None
    closed_s: float = 0.0

    @property
    def name(self) -> str:
        """What the messages come from, as labels and dead letters have it."""
        return self.topic.name


def event_time_s(message: Message, clock: Decoder | None, now_s: float) -> float:
    """Return when a message's event was, in seconds since 1970.

    Args:
      message: the message.
      clock: reads it in the message's content; None, or where it is not there, takes the message's own time.
      now_s: the present, for messages without a time and for those whose time is yet to come.
    """
    said = None if clock is None else clock.time_s(message)
    if said is None:
        said = message.timestamp_ms / 1000 if message.timestamp_ms >= 0 else now_s
    return min(said, now_s)


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
        self._settled_last = {partition: last for partition, _, last in self.settled}
        self.until = None if reading.until is None else dict(reading.until)
        self.watermark_s = -float("inf")
        self.ended = False
        self._fetched = dict(positions)  # the next offset to come from the broker
        self._newest: dict[int, float] = {}
        self._idle: dict[int, float] = {}  # when the broker said that there is no more
        self._at_end: set[int] = set()
        self._paused: set[int] = set()
        self._open_bytes: dict[float, int] = {}  # by the start of a window that time has not come to
        self._filled: set[int] = set()  # windows that have messages, by their number since 1970
        self._closed: int | None = None  # the first window of which nothing was told
        self.behind = False  # whether more messages lie ready than one poll gives
        self._refreshed = self._asked = time.monotonic()
        self._ends = Ends(self.topic)
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

    def poll(self) -> list[tuple[Message, int, float]]:
        """Fetch messages; return those to label, `positions` stand behind them.

        Returns:
          Messages; with each the first offset that is settled with it (between the two lies what is settled, or nothing, as
          compaction and transactions leave it) and its event time in seconds since 1970, the clock's where it has none or one
          that is yet to come.
        """
        self._look_for_partitions()
        found = self.consumer.consume(self.reading.batch_rows, POLL_S)
        self.behind = len(found) == self.reading.batch_rows
        now, window_s, clock, read = time.time(), self.reading.window_s, self.reading.clock, []
        now_ms, window, size = now * 1000, None, 0  # of the messages that follow each other in one window
        fetched, positions, newest, settled_last = self._fetched, self.positions, self._newest, self._settled_last
        for raw in found:
            if raw.error() is not None:
                self._heard(raw)
                continue
            partition, offset = raw.partition(), raw.offset()
            if self.until is not None and offset >= self.until.get(partition, 0):
                self._pause({partition})
                self._at_end.add(partition)
                continue
            if offset < fetched[partition]:  # of a fetch that began before a seek
                continue
            fetched[partition] = offset + 1
            if partition in self._at_end:
                self._at_end.discard(partition)
                self._idle.pop(partition, None)
            sent_ms = raw.timestamp()[1]
            headers = raw.headers()
            message = Message(partition, offset, sent_ms, raw.key(), raw.value(), tuple(headers) if headers else ())
            plain = clock is None and 0 <= sent_ms <= now_ms  # nearly every message
            time_s = sent_ms / 1000 if plain else event_time_s(message, clock, now)
            if time_s > newest.get(partition, 0.0):
                newest[partition] = time_s
            if offset <= settled_last.get(partition, -1) and (partition, offset) in self.settled:
                continue
            if (number := time_s // window_s) != window:
                self._count_bytes(window, size)
                window, size = number, 0
            size += len(message.value or b"")
            read.append((message, positions[partition], time_s))
            positions[partition] = offset + 1
        self._count_bytes(window, size)
        return read

    def _count_bytes(self, window: float | None, size: int) -> None:
        if window is not None:
            self._filled.add(int(window))
            self._open_bytes[window] = self._open_bytes.get(window, 0) + size

    def _heard(self, raw: Any) -> None:
        from confluent_kafka import KafkaError

        error, partition = raw.error(), raw.partition()
        if error.code() == KafkaError._PARTITION_EOF:
            self._fetched[partition] = max(self._fetched.get(partition, 0), raw.offset())
            self._at_end.add(partition)
            return
        gone = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)
        if (
            error.code() == KafkaError.GROUP_AUTHORIZATION_FAILED
        ):  # nobody joins one: who may read the topic need not have one
            return
        if error.fatal() or error.code() in (*gone, KafkaError.TOPIC_AUTHORIZATION_FAILED):
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
        if self.consumer is None:
            return
        for partition, (end, asked_s) in self._ends.answers().items():
            if partition in self._at_end and self._fetched[partition] >= end:
                self._idle[partition] = asked_s
        idle = self._at_end - self._paused
        if idle and time.monotonic() - self._asked >= _IDLE_CHECK_S and self._ends.ask(idle):
            self._asked = time.monotonic()
        self._keep_together()

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

    def a_window_closes(self) -> bool:
        """Tell whether time has come to the end of a window since the watermark was told."""
        window_s, mark = self.reading.window_s, self.new_watermark()
        return mark > self.watermark_s > 0 and mark // window_s > self.watermark_s // window_s

    def empty_windows(self, mark_s: float) -> list[tuple[float, float]]:
        """Return start and end of windows that have passed without a message when time comes to `mark_s`, each once.

        Those of a quiet stream are told together, a minute of them at a time, and those of a long pause as one.
        """
        window_s = self.reading.window_s
        now = int(mark_s // window_s)
        if self._closed is None:
            if self.watermark_s > 0:  # another reader was here and has told of what came before
                self._closed = now + 1
            else:
                known_s = self.reading.closed_s
                self._closed = int(known_s // window_s) if known_s else min((*self._filled, now))
        passed = sorted(window for window in self._filled if self._closed <= window < now)
        if not passed and now - self._closed < _QUIET_S / window_s:
            return []
        spans, start = [], self._closed
        for window in (*passed, now):
            if window > start:
                spans.append((start * window_s, window * window_s))
            start = window + 1
        self._filled = {window for window in self._filled if window >= now}
        self._closed = max(self._closed, now)
        return spans

    def _keep_together(self) -> None:
        """Let partitions that are far ahead of the slowest one wait: their windows cannot close before it has come.

        The client forgets what it has fetched of a partition that waits, so that this is for partitions that lie far apart and
        not for those that are fetched in turns.
        """
        if len(self._fetched) == 1:
            return
        mark = self.new_watermark()
        now = mark // self.reading.window_s if mark > 0 else 0.0
        for window in [window for window in self._open_bytes if window <= now]:
            del self._open_bytes[window]
        held = sum(self._open_bytes.values())
        if held > _AHEAD_BYTES:
            self._pause(
                {p for p, t in self._newest.items() if t // self.reading.window_s > now and p not in self._at_end}
            )
        elif held < _AHEAD_BYTES / 2:
            self._resume({p for p in self._paused if p not in self._at_end})

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
