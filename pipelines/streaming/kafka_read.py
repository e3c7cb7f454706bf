"""ReadKafka: a topic as batches of messages, an unbounded splittable DoFn over confluent-kafka.

One restriction holds all partitions: runners that keep one watermark a stage (Prism) let one partition's present overtake
another's past otherwise, and drop rows as late that nobody is late with. Its position is, by partition, the next offset that
no emitted batch covers. What is known besides lives with the consumer (`kafka_reader`) and may be lost at any time.

Event time is the message's, not beyond the clock's. The watermark is the minimum over partitions of the newest message's
time; a partition with nothing left to read counts as the present less `idle_s`, as the broker says, so that an idle partition
holds nobody back and a broker that is away lets no time pass. A message whose window, with the allowed lateness, ends before
the watermark comes out in a batch of its own that is marked late: nobody is asked about it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.utils.timestamp import MAX_TIMESTAMP, Duration, Timestamp

from distilbeam.pipelines.streaming.batch_source import BatchFn, BatchSource, Stamped
from distilbeam.pipelines.streaming.kafka_reader import POLL_S, Reader, Reading, put_back, take_reader
from distilbeam.pipelines.streaming.message import Message, MessageBatch
from distilbeam.pipelines.streaming.restriction import END, RESTRICTION, WATERMARK

_DEFER_S = 0.05


class ReadKafka(beam.PTransform):
    """Read a topic; see the module. Bounded where the reading has an end, so that every runner takes it.

    Args:
      reading: what is read and how.
      then: what is done with each batch, in the same step; None gives the batches.
    """

    def __init__(self, reading: Reading, then: BatchFn | None = None) -> None:
        super().__init__()
        self.reading, self.then = reading, then

    def expand(self, pipeline: Any) -> Any:
        kind = _ReadUnbounded if self.reading.until is None else _ReadBounded
        read = kind(self.reading, self.then)
        # the start is the element: a runner that starts the stage again must not read what a changed module says
        return pipeline | "Start" >> beam.Create([self.reading.start], reshuffle=False) | "Read" >> beam.ParDo(read)


class _Read(BatchSource):
    def __init__(self, reading: Reading, then: BatchFn | None) -> None:
        super().__init__(then)
        self.reading = reading
        self.late = Metrics.counter("ReadKafka", "late_messages")
        self.read = Metrics.counter("ReadKafka", "messages")

    def _batches(self, tracker: Any, watermark: Any) -> Iterator[Any]:
        reading = self.reading
        reader = take_reader(reading, dict(tracker.current_restriction()))
        now = watermark.current_watermark()
        reader.watermark_s = -float("inf") if now is None else now.micros / 1e6
        try:
            yield from self.done_with(self._read_for_a_while(reader, tracker))
            if reader.ended and tracker.try_claim(END):
                reader.close()
                watermark.set_watermark(MAX_TIMESTAMP)
                return
            mark = reader.new_watermark()
            if mark > reader.watermark_s:
                if reading.until is None:
                    closing_s = mark // reading.window_s * reading.window_s
                    yield from self.done_with([_empty(span, closing_s) for span in reader.empty_windows(mark)])
                watermark.set_watermark(Timestamp(mark))
                reader.watermark_s = mark
            tracker.defer_remainder(Duration(0 if reader.behind else _DEFER_S))
        except BaseException:
            reader.close()
            raise
        finally:
            put_back(reading, reader)

    def _read_for_a_while(self, reader: Reader, tracker: Any) -> Iterator[Stamped]:
        """Read for `max_wait_s`, and emit each batch when it is full; what is left at the end."""
        end = time.monotonic() + max(self.reading.max_wait_s, POLL_S)
        gather = _Gather(self.reading)
        while time.monotonic() < end and not reader.ended:
            if reader.told_to_stop():
                reader.ended = True
                break
            messages = reader.poll()
            if messages and not tracker.try_claim(dict(reader.positions)):
                reader.forget()  # what it has fetched belongs to whoever goes on
                break
            self.read.inc(len(messages))
            for full in gather.add(messages, reader.watermark_s):
                yield self._stamped(*full, reader)
            reader.check_ends()
            if not reader.behind and reader.a_window_closes():
                break  # what follows sees the watermark only when this bundle has ended
        for batch in gather.rest():
            yield self._stamped(*batch, reader)

    def _stamped(self, batch: MessageBatch, time_s: float, reader: Reader) -> Stamped:
        if batch.late:  # in the window that is open now: its own takes nothing any more
            self.late.inc(len(batch.messages))
            return batch, Timestamp(reader.watermark_s)
        return batch, Timestamp(time_s)


def _empty(span: tuple[float, float], closing_s: float) -> Stamped:
    """Tell that windows are empty, in the window that closes now."""
    return MessageBatch((), (), empty=span), Timestamp(closing_s) - Duration(micros=1)


class _ReadUnbounded(_Read):
    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: Any,  # noqa: ARG002
        tracker: Any = RESTRICTION,
        watermark: Any = WATERMARK,
    ) -> Iterator[Any]:
        yield from self._batches(tracker, watermark)


class _ReadBounded(_Read):
    def process(
        self,
        element: Any,  # noqa: ARG002
        tracker: Any = RESTRICTION,
        watermark: Any = WATERMARK,
    ) -> Iterator[Any]:
        yield from self._batches(tracker, watermark)


class _Gather:
    """Messages by window until a batch is full."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self._open: dict[float | None, _Open] = {}

    def add(
        self, messages: Iterable[tuple[Message, int, float]], watermark_s: float
    ) -> Iterator[tuple[MessageBatch, float]]:
        """Add messages as `Reader.poll` gives them; give each batch that they fill, with a time in its window."""
        window_s, lateness_s, rows = self.reading.window_s, self.reading.lateness_s, self.reading.batch_rows
        window, waiting = None, None
        for message, since, time_s in messages:
            if (number := time_s // window_s) != window or waiting is None:
                window, start = number, number * window_s
                key = None if start + window_s + lateness_s <= watermark_s else start
                waiting = self._open.get(key)
                if waiting is None:
                    waiting = self._open[key] = _Open(time_s)
            waiting.add(message, since)
            if len(waiting.messages) >= rows:
                yield self._batch(key)
                waiting = None

    def rest(self) -> Iterator[tuple[MessageBatch, float]]:
        """Give what is left."""
        for key in list(self._open):
            yield self._batch(key)

    def _batch(self, key: float | None) -> tuple[MessageBatch, float]:
        waiting = self._open.pop(key)
        covers = ((p, first, last) for p, pairs in sorted(waiting.covers.items()) for first, last in pairs)
        return MessageBatch(tuple(waiting.messages), tuple(covers), key is None), waiting.time_s


class _Open:
    """A batch that is not full yet.

    Args:
      time_s: a time in its window.
    """

    def __init__(self, time_s: float) -> None:
        self.time_s = time_s
        self.messages: list[Message] = []
        self.covers: dict[int, list[list[int]]] = {}

    def add(self, message: Message, since: int) -> None:
        """Add a message behind those of its partition, with the first offset that is settled with it."""
        self.messages.append(message)
        partition, offset = message[:2]
        covers = self.covers.get(partition)
        if covers is None:
            self.covers[partition] = [[since, offset]]
        elif covers[-1][1] == since - 1:
            covers[-1][1] = offset
        else:
            covers.append([since, offset])
