"""The order in which a soft-label dataset is visited: a function of its row groups, the seed and the epoch alone.

Row groups are permuted, consecutive ones gathered into windows of at least `buffer_rows` rows, and the rows of a window
permuted. Global step s covers the next batch_size x world_size positions of that order and each rank a contiguous part
of them, so that the steps of all ranks, joined, are the same sequence of rows whatever the number of ranks. The last
step of an epoch is shared out as evenly as it can be: every rank makes the same number of steps and no row is lost.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch.

    Attributes:
      group_rows: rows of each row group, in the order of the files.
      buffer_rows: fewest rows of a window, but for the last.
      seed: of the run.
      epoch: number of the epoch.
    """

    group_rows: Sequence[int]
    buffer_rows: int
    seed: int
    epoch: int

    @cached_property
    def windows(self) -> list[list[int]]:
        """Row groups of each window."""
        shuffled = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.group_rows))
        windows: list[list[int]] = [[]]
        filled = 0
        for group in shuffled.tolist():
            if filled >= self.buffer_rows:
                windows.append([])
                filled = 0
            windows[-1].append(group)
            filled += self.group_rows[group]
        return windows

    @cached_property
    def starts(self) -> list[int]:
        """Position at which each window starts, and the number of rows at the end."""
        sizes = [sum(self.group_rows[group] for group in window) for window in self.windows]
        return [0, *accumulate(sizes)]

    def permutation(self, window: int) -> npt.NDArray[np.int64]:
        """Give the order of a window's rows."""
        rows = self.starts[window + 1] - self.starts[window]
        return np.random.default_rng([self.seed, self.epoch, window]).permutation(rows)

    def pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Cut the positions from start to stop at the borders of windows.

        Returns:
          Triples of a window and the positions within it.
        """
        pieces = []
        while start < stop:
            window = bisect_right(self.starts, start) - 1
            end = min(stop, self.starts[window + 1])
            pieces.append((window, start - self.starts[window], end - self.starts[window]))
            start = end
        return pieces


def share(start: int, rows: int, batch_size: int, rank: int, world_size: int) -> tuple[int, int, int]:
    """Find a rank's part of the global step that begins at a position.

    Args:
      start: position at which the step begins.
      rows: positions of the epoch.
      batch_size: rows per rank and step.
      rank: the rank.
      world_size: number of ranks.

    Returns:
      Where the rank's part starts and stops, and where the step ends.
    """
    stop = min(start + batch_size * world_size, rows)
    size = stop - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size, stop
