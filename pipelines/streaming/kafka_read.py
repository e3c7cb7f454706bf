"""ReadKafka: a topic as batches of messages, an unbounded splittable DoFn over confluent-kafka.

One restriction holds all partitions: runners that keep one watermark a stage (Prism) let one partition's present overtake
another's past otherwise, and drop rows as late that nobody is late with. Its position is, by partition, the next offset that
no emitted batch covers. What is known besides lives with the consumer in this process and may be lost at any time.

Event time is the message's, not beyond the clock's. The watermark is the minimum over partitions of the newest message's
time; a partition with nothing left to read counts as the present less `idle_s`, as the broker says, so that an idle partition
holds nobody back and a broker that is away lets no time pass. A message whose window, with the allowed lateness, ends before
the watermark comes out in a batch of its own that is marked late: nobody is asked about it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
from apache_beam.io.iobase import RestrictionProgress, RestrictionTracker
from apache_beam.io.watermark_estimators import ManualWatermarkEstimator
from apache_beam.metrics import Metrics
from apache_beam.transforms.core import RestrictionProvider
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import MAX_TIMESTAMP, Duration, Timestamp

from distilbeam.pipelines.streaming.kafka_client import Topic
from distilbeam.pipelines.streaming.message import Message, MessageBatch
from distilbeam.pipelines.streaming.offsets import Offsets
from distilbeam.pipelines.streaming.stop_file import stop_wanted

log = logging.getLogger("distilbeam.stream")

_REFRESH_S = 10.0  # between two looks for new partitions
_IDLE_CHECK_S = 0.5  # between two questions about the end of a partition that seems idle
_POLL_S = 0.1
_DEFER_S = 0.1
_AHEAD_WINDOWS = 4  # windows that a partition may be ahead of the slowest one: what is open is held in memory
_END = "end"
_readers: dict[str, _Reader] = {}
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


class ReadKafka(beam.PTransform):
    """Read a topic; see the module. Bounded where the reading has an end, so that every runner takes it.

    Args:
      reading: what is read and how.
    """

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self.reading = reading

    def expand(self, pipeline: Any) -> Any:
        read = _ReadUnbounded(self.reading) if self.reading.until is None else _ReadBounded(self.reading)
        # the start is the element: a runner that starts the stage again must not read what a changed module says
        return pipeline | "Start" >> beam.Create([self.reading.start], reshuffle=False) | "Read" >> beam.ParDo(read)


class _Tracker(RestrictionTracker):
    """A restriction ((partition, next offset), ...) that is only ever cut at where it stands: an end is not known."""

    def __init__(self, restriction: tuple[tuple[int, int], ...]) -> None:
        self.start, self.at = restriction, dict(restriction)
        self.stopped = self.ended = False

    def current_restriction(self) -> tuple[tuple[int, int], ...]:
        return tuple(sorted(self.at.items()))

    def current_progress(self) -> RestrictionProgress:
        # with completed= and remaining= Beam divides by the bytes written, 0 / 0 before the first
        return RestrictionProgress(fraction=0.5)

    def is_bounded(self) -> bool:
        return False

    def check_done(self) -> None:
        if not (self.stopped or self.ended):
            raise ValueError("a topic's reading must be deferred or ended")

    def try_claim(self, position: Any) -> bool:
        if self.stopped:
            return False
        if position == _END:
            self.ended = True
        else:
            partition, following = position
            self.at[partition] = following
        return True

    def try_split(self, fraction_of_remainder: float) -> Any:
        # any other fraction of [next offset, 2^63) lies where no message will be for ages
        if fraction_of_remainder != 0 or self.stopped or self.ended:
            return None
        self.stopped = True
        return self.start, self.current_restriction()


class _Provider(RestrictionProvider):
    def initial_restriction(self, element: Any) -> Any:
        return element

    def create_tracker(self, restriction: Any) -> _Tracker:
        return _Tracker(restriction)

    def restriction_size(self, element: Any, restriction: Any) -> int:  # noqa: ARG002
        return 1

    def restriction_coder(self) -> Any:
        return beam.coders.FastPrimitivesCoder()

    def truncate(self, element: Any, restriction: Any) -> None:  # noqa: ARG002
        return None  # a drained pipeline reads no further


_RESTRICTION: Any = beam.DoFn.RestrictionParam(_Provider())
_WATERMARK: Any = beam.DoFn.WatermarkEstimatorParam(ManualWatermarkEstimator.default_provider())


class _Read(beam.DoFn):
    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.late = Metrics.counter("ReadKafka", "late_messages")
        self.read = Metrics.counter("ReadKafka", "messages")

    def _process(self, tracker: Any, watermark: Any) -> Iterator[Any]:
        reading = self.reading
        reader = _take(reading, dict(tracker.current_restriction()))
        now = watermark.current_watermark()
        reader.watermark_s = -float("inf") if now is None else now.micros / 1e6
        try:
            yield from self._read_for_a_while(reader, tracker)
            if reader.ended and tracker.try_claim(_END):
                reader.close()
                watermark.set_watermark(MAX_TIMESTAMP)
                return
            mark = reader.new_watermark()
            if mark > reader.watermark_s:
                watermark.set_watermark(Timestamp(mark))
                reader.watermark_s = mark
            tracker.defer_remainder(Duration(_DEFER_S))
        except BaseException:
            reader.close()
            raise
        finally:
            _put_back(reading, reader)

    def _read_for_a_while(self, reader: _Reader, tracker: Any) -> Iterator[Any]:
        """Read for `max_wait_s`, and emit each batch when it is full; what is left at the end."""
        end = time.monotonic() + max(self.reading.max_wait_s, _POLL_S)
        gather = _Gather(self.reading)
        while time.monotonic() < end and not reader.ended:
            if reader.told_to_stop():
                reader.ended = True
                break
            for message, since in reader.poll():
                if not tracker.try_claim((message.partition, message.offset + 1)):
                    reader.forget()  # what it has fetched belongs to whoever goes on
                    end = 0.0
                    break
                self.read.inc()
                full = gather.add(message, since, reader.watermark_s)
                if full is not None:
                    yield self._stamped(full, reader)
            reader.check_ends()
        for batch in gather.rest():
            yield self._stamped(batch, reader)

    def _stamped(self, batch: MessageBatch, reader: _Reader) -> TimestampedValue:
        if batch.late:  # in the window that is open now: its own takes nothing any more
            self.late.inc(len(batch.messages))
            return TimestampedValue(batch, Timestamp(reader.watermark_s))
        return TimestampedValue(batch, Timestamp(min(event_time_s(m) for m in batch.messages)))


class _ReadUnbounded(_Read):
    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: Any,  # noqa: ARG002
        tracker: Any = _RESTRICTION,
        watermark: Any = _WATERMARK,
    ) -> Iterator[Any]:
        yield from self._process(tracker, watermark)


class _ReadBounded(_Read):
    def process(
        self,
        element: Any,  # noqa: ARG002
        tracker: Any = _RESTRICTION,
        watermark: Any = _WATERMARK,
    ) -> Iterator[Any]:
        yield from self._process(tracker, watermark)


def event_time_s(message: Message) -> float:
    """Return a message's time in seconds since 1970, the clock's where it has none or one that is yet to come."""
    now = time.time()
    return min(message.timestamp_ms / 1000, now) if message.timestamp_ms >= 0 else now


class _Gather:
    """Messages by window until a batch is full."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self._open: dict[float | None, list[tuple[Message, int]]] = {}

    def add(self, message: Message, since: int, watermark_s: float) -> MessageBatch | None:
        """Add a message and the first offset that is settled with it; give the batch that it fills."""
        window_s = self.reading.window_s
        start = event_time_s(message) // window_s * window_s
        late = start + window_s + self.reading.lateness_s <= watermark_s
        key = None if late else start
        waiting = self._open.setdefault(key, [])
        waiting.append((message, since))
        return self._batch(key) if len(waiting) >= self.reading.batch_rows else None

    def rest(self) -> Iterator[MessageBatch]:
        """Give what is left."""
        for key in list(self._open):
            yield self._batch(key)

    def _batch(self, key: float | None) -> MessageBatch:
        waiting = self._open.pop(key)
        covers = Offsets()
        for message, since in waiting:
            covers.add(message.partition, since, message.offset)
        return MessageBatch(tuple(message for message, _ in waiting), tuple(covers), key is None)


class _Reader:
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
        for raw in self.consumer.consume(self.reading.batch_rows, _POLL_S):
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


def _take(reading: Reading, positions: dict[int, int]) -> _Reader:
    """Return the reader that stands at the positions, a new one where there is none."""
    with _lock:
        reader = _readers.pop(_name(reading), None)
    if reader is not None and reader.consumer is not None:
        # partitions that were found and of which nothing was claimed yet are not in the restriction
        if all(positions.get(p, 0) == offset for p, offset in reader.positions.items()):
            return reader
        reader.close()
    return _Reader(reading, positions)


def _put_back(reading: Reading, reader: _Reader) -> None:
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
