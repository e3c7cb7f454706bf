"""A source that does in its own step what is done with its batches.

A runner that does not fuse a source with what follows it (Prism) would be given every message, as bytes, and give it back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import apache_beam as beam
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from distilbeam.pipelines.streaming.message import MessageBatch, Outcome

Stamped = tuple[MessageBatch, Timestamp]  # a batch and a time in its window


class BatchFn(Protocol):
    """What is done with a batch: a DoFn without parameters."""

    def start_bundle(self) -> None: ...

    def process(self, batch: MessageBatch) -> Iterator[Outcome]: ...

    def finish_bundle(self) -> None: ...


class BatchSource(beam.DoFn):
    """The part of a source that hands its batches on.

    Args:
      then: what is done with each batch; None gives the batches.
    """

    def __init__(self, then: BatchFn | None) -> None:
        self.then = then

    def start_bundle(self) -> None:
        if self.then is not None:
            self.then.start_bundle()

    def finish_bundle(self) -> None:
        if self.then is not None:
            self.then.finish_bundle()

    def done_with(self, batches: Iterable[Stamped]) -> Iterator[Any]:
        """Give what becomes of batches, at their times."""
        for batch, time in batches:
            for found in (batch,) if self.then is None else self.then.process(batch):
                yield TimestampedValue(found, time)
