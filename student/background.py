"""Work on an epoch's batches in threads, ahead of who takes them and in their order.

One thread reads windows, others make pieces of several batches out of them. What is ready or under way at a time is
bounded: a piece for each thread and one more, and the windows that these need and the one after.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Generic, TypeVar

import numpy as np

from distilbeam.student.order import EpochOrder, Rows, Shares

Window = TypeVar("Window")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Work(Generic[Window, Made]):
    """What is to be done.

    Attributes:
      order: of the epoch.
      shares: the rank's batches.
      read: reads a window by its number and gives it with the order of its rows.
      make: makes consecutive batches of rows of one or more windows, given their sizes and first positions.
    """

    order: EpochOrder
    shares: Shares
    read: Callable[[EpochOrder, int], tuple[Window, Rows]]
    make: Callable[[Sequence[tuple[Window, Rows]], Sequence[int], Sequence[int]], list[Made]]


def in_background(work: Work[Any, Made], batches_per_piece: int, threads: int) -> Iterator[tuple[Made, int]]:
    """Do the work.

    Args:
      work: what is to be done.
      batches_per_piece: how many batches are made at once.
      threads: how many make batches.

    Yields:
      Each batch with the position at which its step ends.
    """
    shares = work.shares
    reader, makers = ThreadPoolExecutor(1), ThreadPoolExecutor(threads)
    under_way: deque[tuple[Future[list[Made]], list[int]]] = deque()
    try:
        windows = _Windows(work, reader)
        for first in range(0, len(shares.ends), batches_per_piece):
            steps = slice(first, first + batches_per_piece)
            made = makers.submit(_made, work, windows.of(steps), steps)
            under_way.append((made, shares.ends[steps].tolist()))
            if len(under_way) > threads:
                yield from _oldest(under_way)
        while under_way:
            yield from _oldest(under_way)
    finally:
        # makers wait for windows: they are joined while the reader still works
        for pool in (makers, reader):
            pool.shutdown(wait=True, cancel_futures=True)


class _Windows(Generic[Window, Made]):
    """The windows being read or just read."""

    def __init__(self, work: Work[Window, Made], reader: ThreadPoolExecutor) -> None:
        self.work, self.reader = work, reader
        self.following = dict(pairwise(work.shares.windows(work.order)))
        self.reading: dict[int, Future[tuple[Window, Rows]]] = {}

    def of(self, steps: slice) -> list[tuple[Future[tuple[Window, Rows]], list[slice]]]:
        """Find the windows of some steps, and in each the positions that are the rank's."""
        found: dict[int, list[slice]] = {}
        shares = self.work.shares
        for start, stop in zip(shares.starts[steps].tolist(), shares.stops[steps].tolist(), strict=True):
            for window, begin, end in self.work.order.pieces(start, stop):
                ranges = found.setdefault(window, [])
                if ranges and ranges[-1].stop == begin:
                    begin = ranges.pop().start
                ranges.append(slice(begin, end))
        return [(self._read(window), ranges) for window, ranges in found.items()]

    def _read(self, window: int) -> Future[tuple[Window, Rows]]:
        """Read a window and the one after, and forget those before, which the pieces under way still hold."""
        for wanted in (window, self.following.get(window)):
            if wanted is not None and wanted not in self.reading:
                self.reading[wanted] = self.reader.submit(self.work.read, self.work.order, wanted)
        self.reading = {number: future for number, future in self.reading.items() if number >= window}
        return self.reading[window]


def _made(
    work: Work[Window, Made], found: Sequence[tuple[Future[tuple[Window, Rows]], list[slice]]], steps: slice
) -> list[Made]:
    parts = []
    for future, ranges in found:
        window, rows = future.result()
        parts.append((window, np.concatenate([rows[part] for part in ranges])))
    starts = work.shares.starts[steps]
    return work.make(parts, (work.shares.stops[steps] - starts).tolist(), starts.tolist())


def _oldest(under_way: deque[tuple[Future[list[Made]], list[int]]]) -> Iterator[tuple[Made, int]]:
    made, ends = under_way.popleft()
    yield from zip(made.result(), ends, strict=True)
