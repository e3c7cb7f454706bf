"""ReadPubsub: a Pub/Sub subscription as batches of messages, an unbounded splittable DoFn over Pub/Sub's streaming pull.

Its restriction says nothing: Pub/Sub keeps what is not acknowledged, and acknowledged is what is committed (`pubsub_reader`). The
watermark follows the messages as they come and, where none come, the clock; a message behind it is taken all the same, its
window's rows are then written in a pane of their own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.utils.timestamp import MAX_TIMESTAMP, Duration, Timestamp

from distilbeam.pipelines.streaming.batch_source import BatchFn, BatchSource, Stamped
from distilbeam.pipelines.streaming.message import Message, MessageBatch
from distilbeam.pipelines.streaming.pubsub_reader import Delivered, PubsubReader, PubsubReading, take_pubsub_reader
from distilbeam.pipelines.streaming.restriction import END, RESTRICTION, WATERMARK

_DEFER_S = 0.05
_NOWHERE = ((0, 0),)  # of an empty restriction Beam takes the remainder for none


class ReadPubsub(beam.PTransform):
    """Read a subscription; see the module.

    Args:
      reading: what is read and how.
      then: what is done with each batch, in the same step; None gives the batches.
    """

    def __init__(self, reading: PubsubReading, then: BatchFn | None = None) -> None:
        super().__init__()
        self.reading, self.then = reading, then

    def expand(self, pipeline: Any) -> Any:
        start = pipeline | "Start" >> beam.Create([_NOWHERE], reshuffle=False)
        return start | "Read" >> beam.ParDo(_Read(self.reading, self.then))


class _Read(BatchSource):
    def __init__(self, reading: PubsubReading, then: BatchFn | None) -> None:
        super().__init__(then)
        self.reading = reading
        self.late = Metrics.counter("ReadPubsub", "late_messages")
        self.read = Metrics.counter("ReadPubsub", "messages")

    @beam.DoFn.unbounded_per_element()
    def process(
        self,
        element: Any,  # noqa: ARG002
        tracker: Any = RESTRICTION,
        watermark: Any = WATERMARK,
    ) -> Iterator[Any]:
        yield from self._batches(tracker, watermark)

    def _batches(self, tracker: Any, watermark: Any) -> Iterator[Any]:
        reader = take_pubsub_reader(self.reading)
        now = watermark.current_watermark()
        reader.watermark_s = -float("inf") if now is None else now.micros / 1e6
        try:
            yield from self.done_with(self._read_for_a_while(reader, tracker))
            if reader.told and tracker.try_claim(END):
                watermark.set_watermark(MAX_TIMESTAMP)  # the reader lives on: what it holds is not committed yet
                return
            mark = reader.new_watermark()
            if mark > reader.watermark_s:
                watermark.set_watermark(Timestamp(mark))
                reader.watermark_s = mark
            tracker.defer_remainder(Duration(_DEFER_S))
        except BaseException:
            reader.close()  # what was given out and will not be committed comes again
            raise

    def _read_for_a_while(self, reader: PubsubReader, tracker: Any) -> Iterator[Stamped]:
        """Read for `max_wait_s`, emit each batch when it is full and the rest at the end."""
        end = time.monotonic() + max(self.reading.max_wait_s, 0.1)
        waiting: dict[tuple[float, bool], list[Delivered]] = {}
        while time.monotonic() < end and not reader.told_to_stop() and tracker.try_claim({}):
            delivered = reader.poll()
            self.read.inc(len(delivered))
            for each in delivered:
                key = self._window(each, reader.watermark_s)
                same = waiting.setdefault(key, [])
                same.append(each)
                if len(same) >= self.reading.batch_rows:
                    yield self._stamped(key, waiting.pop(key))
        for key, same in waiting.items():
            yield self._stamped(key, same)

    def _window(self, each: Delivered, watermark_s: float) -> tuple[float, bool]:
        """Return the start of the window that a message comes in, and whether nobody is to be asked about it."""
        window_s = self.reading.window_s
        start = each.time_s // window_s * window_s
        if self.reading.strict and start + window_s <= watermark_s:  # the window's choice is made
            return watermark_s // window_s * window_s, True
        return start, each.late

    def _stamped(self, key: tuple[float, bool], same: list[Delivered]) -> Stamped:
        start, late = key
        messages: tuple[Message, ...] = tuple(each.message for each in same)
        if late:
            self.late.inc(len(messages))
        return MessageBatch(messages, (), late), Timestamp(start)
