"""Work on an epoch's batches in threads, ahead of who takes them and in their order.

Two threads or more read row groups and decode them, one shuffles windows of them, others make pieces of several batches
out of these. What is ready or under way at a time is bounded: a piece for each maker and one more, the windows that these
need, and as many more as there are readers: with fewer, readers waited for the shuffle of a window before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from distilbeam.student.data.sampler import EpochOrder, Shares

READERS = 2  # at least: decoding takes longer than everything else together
Read = TypeVar("Read")
Shuffled = TypeVar("Shuffled")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Work(Generic[Read, Shuffled, Made]):
    """What is to be done.

    Attributes:
      order: the epoch's order of rows.
      shares: the rank's batches.
      read: reads a row group by its number.
      shuffle: puts the rank's rows of a window in the order of their visit.
      make: makes consecutive batches out of slices of shuffled windows, given their sizes and first positions.
    """

    order: EpochOrder
    shares: Shares
    read: Callable[[int], Read]
    shuffle: Callable[[EpochOrder, int, dict[int, Read], Shares], Shuffled]
    make: Callable[[Sequence[tuple[Shuffled, slice]], Sequence[int], Sequence[int]], list[Made]]


def in_background(work: Work[Any, Any, Made], batches_per_piece: int, threads: int) -> Iterator[tuple[Made, int]]:
    """Do the work.

    Args:
      work: what is to be done.
      batches_per_piece: how many batches are made at once.
      threads: how many make batches; as many read, or `READERS` if that is more.

    Yields:
      Each batch with the position at which its step ends.
    """
    shares = work.shares
    ahead = max(READERS, threads)
    readers, shuffler, makers = ThreadPoolExecutor(ahead), ThreadPoolExecutor(1), ThreadPoolExecutor(threads)
    under_way: deque[tuple[Future[list[Made]], list[int]]] = deque()
    try:
        windows = _Windows(work, readers, shuffler, ahead)
        for first in range(0, len(shares.ends), batches_per_piece):
            steps = slice(first, first + batches_per_piece)
            made = makers.submit(_made, work, windows.of(steps), steps)
            under_way.append((made, shares.ends[steps].tolist()))
            if len(under_way) > threads:
                yield from _oldest(under_way)
        while under_way:
            yield from _oldest(under_way)
    finally:
        # each pool waits for the one after it in this list: it is joined while that still works
        for pool in (makers, shuffler, readers):
            pool.shutdown(wait=True, cancel_futures=True)


class _Windows(Generic[Read, Shuffled]):
    """The windows that hold rows of the rank, from the one of the last piece on."""

    def __init__(
        self, work: Work[Read, Shuffled, Any], readers: ThreadPoolExecutor, shuffler: ThreadPoolExecutor, ahead: int
    ) -> None:
        self.work, self.readers, self.shuffler, self.ahead = work, readers, shuffler, ahead
        self.to_come = deque(work.shares.windows(work.order))
        self.open: deque[tuple[int, int, Future[Shuffled]]] = deque()

    def of(self, steps: slice) -> list[tuple[Future[Shuffled], slice]]:
        """Find the shuffled windows of some steps, and the steps' rows in each."""
        before = self.work.shares.before
        first, last = int(before[steps.start]), int(before[min(steps.stop, len(before) - 1)])
        while self.open and self.open[0][1] <= first:
            self.open.popleft()  # pieces under way still hold it
        while self.to_come and (len(self.open) < self.ahead or self.open[-self.ahead][0] < last):
            self._start(*self.to_come.popleft())
        found = [(max(first, begin), min(last, end), begin, future) for begin, end, future in self.open]
        return [(future, slice(a - begin, b - begin)) for a, b, begin, future in found if a < b]

    def _start(self, window: int, begin: int, end: int) -> None:
        groups = self.work.order.groups(window)
        reading = {number: self.readers.submit(self.work.read, number) for number in groups}
        self.open.append((begin, end, self.shuffler.submit(self._shuffled, window, reading)))

    def _shuffled(self, window: int, reading: dict[int, Future[Read]]) -> Shuffled:
        read = {number: reading.pop(number).result() for number in list(reading)}
        return self.work.shuffle(self.work.order, window, read, self.work.shares)


def _made(work: Work[Any, Shuffled, Made], parts: Sequence[tuple[Future[Shuffled], slice]], steps: slice) -> list[Made]:
    shares = work.shares
    sizes, starts = shares.stops[steps] - shares.starts[steps], shares.starts[steps]
    return work.make([(window.result(), rows) for window, rows in parts], sizes.tolist(), starts.tolist())


def _oldest(under_way: deque[tuple[Future[list[Made]], list[int]]]) -> Iterator[tuple[Made, int]]:
    made, ends = under_way.popleft()
    yield from zip(made.result(), ends, strict=True)
