"""A source that does in its own step what is done with its batches.

A runner that does not fuse a source with what follows it (Prism) would be given every message, as bytes, and give it back.
So that a slow teacher holds up no reading and a server is asked several questions at once, batches are asked about on threads,
a bounded number of them at a time; what becomes of them is given out in their order, all of it before time goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import apache_beam as beam
from apache_beam.transforms.window import TimestampedValue
from apache_beam.utils.timestamp import Timestamp

from distilbeam.pipelines.streaming.message import MessageBatch, Outcome

Stamped = tuple[MessageBatch, Timestamp]  # a batch and a time in its window


class BatchFn(Protocol):
    """What is done with a batch."""

    def start_bundle(self) -> None:
        """Begin a bundle."""

    def begin(self, batch: MessageBatch) -> Outcome | Callable[[], Outcome]:
        """Give what became of a batch or, where somebody is to be asked, what asks, on whichever thread."""

    def in_flight(self) -> int:
        """Return how many batches may be asked about at once."""

    def start_thread(self) -> None:
        """Prepare a thread that asks."""

    def require_same_teacher(self) -> None:
        """Raise where the answers since this was called last may be another teacher's."""

    def finish_bundle(self) -> None:
        """End a bundle."""


class BatchSource(beam.DoFn):
    """The part of a source that hands its batches on.

    Args:
      then: what is done with each batch; None gives the batches.
    """

    _threads: ThreadPoolExecutor | None = None

    def __init__(self, then: BatchFn | None) -> None:
        self.then = then

    def start_bundle(self) -> None:
        if self.then is not None:
            self.then.start_bundle()

    def finish_bundle(self) -> None:
        if self.then is not None:
            self.then.finish_bundle()

    def teardown(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def done_with(self, batches: Iterable[Stamped]) -> Iterator[Any]:
        """Give what becomes of batches, at their times and in their order."""
        if self.then is None:
            yield from (TimestampedValue(batch, time) for batch, time in batches)
            return
        most, asked = self.then.in_flight(), False
        waiting: deque[tuple[Outcome | Future[Outcome], Timestamp]] = deque()
        try:
            for batch, time in batches:
                begun = self.then.begin(batch)
                if isinstance(begun, Outcome):
                    waiting.append((begun, time))
                else:
                    waiting.append((self._pool(most).submit(begun), time))
                    asked = True
                while waiting and (len(waiting) > most or _is_known(waiting[0][0])):
                    yield _stamped(*waiting.popleft())
            while waiting:
                yield _stamped(*waiting.popleft())
            if asked:  # nothing of a bundle counts that raises at its end
                self.then.require_same_teacher()
        finally:
            for found, _ in waiting:
                if not isinstance(found, Outcome):
                    found.cancel()

    def _pool(self, threads: int) -> ThreadPoolExecutor:
        if self._threads is None:
            assert self.then is not None
            self._threads = ThreadPoolExecutor(threads, "asking", self.then.start_thread)
        return self._threads


def _is_known(found: Outcome | Future[Outcome]) -> bool:
    return isinstance(found, Outcome) or found.done()


def _stamped(found: Outcome | Future[Outcome], time: Timestamp) -> TimestampedValue:
    return TimestampedValue(found if isinstance(found, Outcome) else found.result(), time)
