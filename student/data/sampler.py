"""The sampler of a soft-label dataset: the order of an epoch, a function of row groups, seed and epoch alone.

Row groups are permuted, consecutive ones gathered into windows of at least `buffer_rows` rows, and the rows of a window
permuted. An epoch may visit some row groups more often than others: a whole pass over a group is one unit of the order,
and a part of a pass is a unit of rows drawn anew in every epoch.

Global step s covers the next batch_size x world_size positions of that order and each rank a contiguous part of them,
so that the steps of all ranks, joined, are the same sequence of rows whatever the number of ranks. What an epoch has
beyond whole steps is no small step of its own, which batch norms could not take and whose rows would weigh more: the
last two steps share their rows evenly. Every rank makes the same number of steps and no row is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch.

    Attributes:
      group_rows: rows of each row group, in the order of the files.
      buffer_rows: fewest rows of a window, but for the last.
      seed: with the epoch it decides every permutation.
      epoch: number of the epoch.
      visits: how many rows of each row group the epoch visits; None for every row once. Of v visits to n rows, each row
        gets floor(v / n) or one more.
    """

    group_rows: Sequence[int]
    buffer_rows: int
    seed: int
    epoch: int
    visits: Sequence[int] | None = None

    @cached_property
    def units(self) -> list[tuple[int, int]]:
        """Row group and number of rows of each unit."""
        units = []
        for group, (rows, visits) in enumerate(zip(self.group_rows, self.visits or self.group_rows, strict=True)):
            whole, part = divmod(visits, rows)
            units += [(group, rows)] * whole + ([(group, part)] if part else [])
        return units

    @cached_property
    def windows(self) -> list[list[int]]:
        """Units of each window, in the order of the files."""
        # Two levels: row groups in random order, rows permuted inside a window of them. A permutation of all rows would
        # decode a row group once for nearly each of its rows; windows decode each once, at the price that rows of one row
        # group meet in the same window.
        shuffled = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.units))
        windows: list[list[int]] = [[]]
        filled = 0
        for unit in shuffled.tolist():
            if filled >= self.buffer_rows:
                windows.append([])
                filled = 0
            windows[-1].append(unit)
            filled += self.units[unit][1]
        # Which units are together is random, the order inside does not matter (`places` permutes the rows) and is that of the
        # files, so that a window reads forward.
        return [sorted(window) for window in windows]

    @cached_property
    def starts(self) -> list[int]:
        """Position at which each window starts, and the number of positions at the end."""
        sizes = [sum(self.units[unit][1] for unit in window) for window in self.windows]
        return [0, *accumulate(sizes)]

    def groups(self, window: int) -> list[int]:
        """List the row groups of a window."""
        return sorted({self.units[unit][0] for unit in self.windows[window]})

    def drawn(self, unit: int) -> Rows | None:
        """Give the rows of a unit as indices into its row group; None for all in their order."""
        group, count = self.units[unit]
        if count == self.group_rows[group]:
            return None
        return _permutation(self.group_rows[group], self.seed, self.epoch, group, count)[:count]

    def places(self, window: int) -> Rows:
        """Give each of a window's rows, one unit after another, its place in the order of the window."""
        return _permutation(self.starts[window + 1] - self.starts[window], self.seed, self.epoch, window)


@dataclass(frozen=True)
class Shares:
    """A rank's part of the steps that are left of an epoch.

    Attributes:
      starts: int64 [steps], position at which the rank's part of each step begins.
      stops: int64 [steps], position at which it ends.
      ends: int64 [steps], position at which the whole step ends.
    """

    starts: Rows
    stops: Rows
    ends: Rows

    @classmethod
    def of(cls, position: int, rows: int, batch_size: int, rank: int, world_size: int) -> Shares:
        """Share out the steps from a position to the end of an epoch.

        Args:
          position: where the next step begins.
          rows: positions of the epoch.
          batch_size: rows per rank and step.
          rank: the rank.
          world_size: number of ranks.
        """
        # Global steps first, then each rank's contiguous part of one: cutting by rank first would give other steps for another
        # number of ranks, and a training that goes on with more processes would see other batches.
        first = step_starts(position, rows, batch_size * world_size)
        ends = np.append(first[1:], max(position, rows))[: len(first)]
        size = ends - first
        return cls(first + size * rank // world_size, first + size * (rank + 1) // world_size, ends)

    @cached_property
    def before(self) -> Rows:
        """Number of the rank's rows before each step, and in all: int64 [steps + 1]."""
        counted: Rows = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.stops - self.starts)])
        return counted

    def positions(self, begin: int, end: int) -> Rows:
        """List the rank's positions from begin to end."""
        # the steps of which the rank's part overlaps [begin, end): those that end after begin and start before end
        first, last = np.searchsorted(self.stops, begin, side="right"), np.searchsorted(self.starts, end)
        starts, stops = np.maximum(self.starts[first:last], begin), np.minimum(self.stops[first:last], end)
        sizes = np.maximum(stops - starts, 0)
        # a step's positions follow each other: count on from where the one before it ended
        positions: Rows = np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
        return positions

    def places(self, order: EpochOrder, window: int) -> tuple[Rows, int]:
        """Give each of a window's rows its place among those of the rank.

        Returns:
          int64 [rows of the window], -1 for the rows of other ranks; and the number of the rank's.
        """
        begin, end = order.starts[window : window + 2]
        everywhere = order.places(window)
        if self._all_mine(begin, end):  # a single rank, as a rule: nothing has to be counted among others' rows
            return everywhere, len(everywhere)
        mine = self.positions(begin, end)
        # `everywhere` says at which position each row of the window is visited; `among_mine` turns a position into the number
        # of the rank's rows before it, and -1 where the position is another rank's
        among_mine = np.full(len(everywhere), -1, np.int64)
        among_mine[mine - begin] = np.arange(len(mine))
        return among_mine[everywhere], len(mine)

    def _all_mine(self, begin: int, end: int) -> bool:
        """Whether the rank has every position from begin to end."""
        first, last = np.searchsorted(self.stops, begin, side="right"), np.searchsorted(self.starts, end)
        starts, stops = self.starts[first:last], self.stops[first:last]
        return bool(first < last and starts[0] <= begin and stops[-1] >= end and (starts[1:] == stops[:-1]).all())

    def windows(self, order: EpochOrder) -> list[tuple[int, int, int]]:
        """List the windows that hold rows of the rank, which are not all where a step is larger than a window.

        Returns:
          Triples of a window and the rank's rows before it and before the next one.
        """
        # The rank's rows before each window's border: those of whole steps before it (`before`), and what the border cuts off
        # of the step that it falls into. A window of which the rank has none is not read at all.
        borders = np.asarray(order.starts, np.int64)
        step = np.searchsorted(self.stops, borders, side="right")
        within = np.maximum(borders - np.append(self.starts, borders[-1])[step], 0)
        upto = (self.before[step] + within).tolist()
        return [(window, a, b) for window, (a, b) in enumerate(pairwise(upto)) if a < b]


def step_starts(position: int, rows: int, step_rows: int) -> Rows:
    """Give the positions at which the steps from a position to the end of an epoch begin.

    All have `step_rows` rows but the last two, which share what they have: a function of the rows that are left, so that
    whoever goes on between two steps makes the same ones.

    Args:
      position: where the next step begins.
      rows: positions of the epoch.
      step_rows: rows of a whole step.

    Returns:
      int64 [steps].
    """
    starts = np.arange(position, rows, step_rows, dtype=np.int64)
    if len(starts) > 1:  # by what is left, not by the epoch: whoever goes on between two steps computes the same ends
        starts[-1] = rows - (rows - starts[-2]) // 2 if rows - starts[-1] < step_rows else starts[-1]
    return starts


def _permutation(rows: int, *seed: int) -> Rows:
    # of NumPy's generators the one that permutes fastest
    return np.random.Generator(np.random.SFC64(seed)).permutation(rows)


def mixed_visits(datasets: Sequence[Sequence[int]], weights: Sequence[float]) -> list[int]:
    """Share an epoch of as many positions as there are rows out to datasets by weight, and to their row groups by size.

    Args:
      datasets: rows of each row group of each dataset.
      weights: non-negative, of each dataset; only their ratios matter.

    Returns:
      Visits of each row group, the datasets one after another; their sum is the number of rows.
    """
    sizes = [sum(groups) for groups in datasets]
    ideal = np.asarray(weights, np.float64) / np.sum(weights) * sum(sizes)
    shares = np.floor(ideal).astype(np.int64)
    shares[np.argsort(shares - ideal, kind="stable")[: sum(sizes) - int(shares.sum())]] += 1  # largest remainders
    visits: list[int] = []
    for groups, size, share in zip(datasets, sizes, shares.tolist(), strict=True):
        upto = [rows * share // size for rows in accumulate(groups, initial=0)]
        visits += [b - a for a, b in pairwise(upto)]
    return visits
