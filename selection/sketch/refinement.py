"""The second pass that makes a sketched solution exact.

The solution on bins is the solution on the gains unless the level or the cut falls inside a bin. The refinement counts the
distinct float32 values of these bins and of their neighbours (65,536 counters for a bin) and, where points are bought with
certainty, sums the low bits of their gains, which makes the guaranteed value exact; then the game is solved again, with
every distinct value of the refined bins as a level of its own. If the level or the cut has moved to yet another bin, the new
threshold asks for one more pass: that takes a pool with almost empty bins.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from distilbeam.selection import compiled
from distilbeam.selection.sketch.bins import (
    FIRST_BIN,
    LOW_BITS,
    UNIT,
    Floats32,
    Ints,
    as_float32_gains,
    bin_edges,
    bin_numbers,
    chunks,
    low_bits,
    reciprocals,
)
from distilbeam.selection.sketch.levels import Levels, Spending, solve_levels
from distilbeam.selection.sketch.threshold import Threshold

if TYPE_CHECKING:
    from distilbeam.selection.sketch.gain_sketch import GainSketch

_HEADER = struct.Struct("<4sdqIIIII")
_MAGIC = b"DBR1"
_FLUSH = 1 << 20  # gains of refined bins that are counted at a time
_COMPILED_CHUNK = 1 << 17  # gains that stay in the second-level cache while each run of bins is counted


class Refinement:
    """Counters for the bins in which a solution's level and cut fall; made by `Threshold.refinement`.

    Add every gain of the sketched pool, on any machine and in any order, merge, and solve.

    Attributes:
      bins: the refined bins, ascending.
      summed: first and last (exclusive) of the bins whose gains are summed.
    """

    def __init__(
        self, sketch: GainSketch, wrong: float, budget: int, bins: Iterable[int], summed: tuple[int, int] = (0, 0)
    ) -> None:
        self._sketch, self._wrong, self._budget = sketch.copy(), wrong, budget
        self.bins = tuple(sorted(bins))
        self.summed = summed
        self._counts: dict[int, Ints] = {
            first: np.zeros(size << LOW_BITS, np.int64) for first, size in _runs(self.bins)
        }
        self._lows: Ints = np.zeros(summed[1], np.int64)

    def fresh(self) -> Refinement:
        """Return an empty refinement of the same solution."""
        return Refinement(self._sketch, self._wrong, self._budget, self.bins, self.summed)

    def add(self, gains: npt.ArrayLike) -> None:
        """Count gains of the sketched pool; those in other bins are passed over.

        Args:
          gains: float [n], >= 0, the same values as were sketched.

        Raises:
          ValueError: a gain is negative, NaN, infinite or beyond float32.
        """
        array = as_float32_gains(gains)
        if (kernels := compiled.kernels(len(array))) is not None:
            self._add_compiled(kernels, array.view(np.uint32))
            return
        for first, counts in self._counts.items():
            _count_patterns(array, first << LOW_BITS, counts)
        if self.summed[0] < self.summed[1]:
            for chunk in chunks(array):
                self._sum_lows(chunk)

    def merge(self, other: Refinement) -> None:
        """Add another refinement's counters; any order of merging gives the same result.

        Raises:
          ValueError: the other one refines another solution.
        """
        if self._plan() != other._plan() or self._sketch != other._sketch:
            raise ValueError("refinements must be of the same threshold to be merged; these refine different solutions")
        for first, counts in self._counts.items():
            counts += other._counts[first]
        self._lows += other._lows

    def solve(self) -> Threshold:
        """Solve the game again with every distinct gain of the refined bins.

        Returns:
          The threshold, exact unless the level or the cut has moved to a bin that was not refined.

        Raises:
          ValueError: not every gain of the sketched pool has been added exactly once.
        """
        self._check_complete()
        pool = _BinnedPool(self)
        spending = solve_levels(pool.levels, self._wrong, self._budget)
        if spending is None:
            return pool.uniform(self._wrong, self._budget)
        next_bins, summed = pool.open_bins(spending)
        if not next_bins and not summed[1]:
            return pool.threshold(spending, self._wrong, self._budget, None)
        refinement = Refinement(self._sketch, self._wrong, self._budget, {*self.bins, *next_bins}, summed)
        return pool.threshold(spending, self._wrong, self._budget, refinement)

    def to_bytes(self) -> bytes:
        """Serialise the refinement with its sketch, little-endian."""
        sketch = self._sketch.to_bytes()
        patterns, counts = self._used()
        lengths = (len(sketch), len(self.bins), len(patterns), *self.summed)
        head = _HEADER.pack(_MAGIC, self._wrong, self._budget, *lengths)
        lows = self._lows[self.summed[0] :]
        columns = np.array(self.bins, "<u2"), patterns.astype("<u4"), counts.astype("<i8"), lows.astype("<i8")
        return b"".join([head, sketch, *(column.tobytes() for column in columns)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Refinement:
        """Rebuild a refinement from `to_bytes`'s bytes.

        Raises:
          ValueError: the bytes are not a whole refinement of this version.
        """
        from distilbeam.selection.sketch.gain_sketch import GainSketch  # sketch.py imports this module

        head = _HEADER.unpack_from(data) if len(data) >= _HEADER.size else (b"", 0.0, 0, 0, 0, 0, 0, 0)
        magic, wrong, budget, sketch_size, bins, used, first, last = head
        size = _HEADER.size + sketch_size + 2 * bins + 12 * used + 8 * (last - first)
        if magic != _MAGIC or len(data) != size:
            raise ValueError(f"data must be the bytes of Refinement.to_bytes, got {len(data):,} bytes that are not")
        start = _HEADER.size + sketch_size
        numbers = np.frombuffer(data, "<u2", bins, start)
        patterns = np.frombuffer(data, "<u4", used, start + 2 * bins)
        sums = np.frombuffer(data, "<i8", used + last - first, start + 2 * bins + 4 * used)
        sketch = GainSketch.from_bytes(data[_HEADER.size : start])
        refinement = cls(sketch, wrong, budget, numbers.tolist(), (first, last))
        for begin, counts in refinement._counts.items():
            inside = (patterns >= begin << LOW_BITS) & (patterns < (begin << LOW_BITS) + len(counts))
            counts[patterns[inside] - np.uint32(begin << LOW_BITS)] = sums[:used][inside]
        refinement._lows[first:] = sums[used:]
        return refinement

    def _plan(self) -> tuple[object, ...]:
        return self._wrong, self._budget, self.bins, self.summed

    def _used(self) -> tuple[npt.NDArray[np.uint32], Ints]:
        """Give the bit patterns of the refined bins that occur, ascending, and their counts."""
        patterns = [np.flatnonzero(counts) + (first << LOW_BITS) for first, counts in self._counts.items()]
        numbers = [counts[counts > 0] for counts in self._counts.values()]
        if not patterns:
            return np.zeros(0, np.uint32), np.zeros(0, np.int64)
        return np.concatenate(patterns).astype(np.uint32), np.concatenate(numbers)

    def _add_compiled(self, kernels: compiled.Kernels, patterns: npt.NDArray[np.uint32]) -> None:
        low, high = (number << LOW_BITS for number in self.summed)
        for start in range(0, len(patterns), _COMPILED_CHUNK):
            chunk = patterns[start : start + _COMPILED_CHUNK]
            for first, counts in self._counts.items():
                kernels.count_patterns(chunk, np.uint32(first << LOW_BITS), counts)
            if low < high:
                kernels.sum_lows(chunk, low, high, self._lows)

    def _sum_lows(self, gains: Floats32) -> None:
        low, high = (np.uint32(number << LOW_BITS) for number in self.summed)
        inside = gains[(gains.view(np.uint32) - low) < high - low]
        sums = np.bincount(bin_numbers(inside), weights=low_bits(inside), minlength=self.summed[1])
        self._lows += sums.astype(np.int64)

    def _check_complete(self) -> None:
        for first, counts in self._counts.items():
            found = counts.reshape(-1, 1 << LOW_BITS).sum(axis=1)
            wanted = self._sketch.counts[first : first + len(found)]
            if not np.array_equal(found, wanted):
                raise ValueError(
                    "refinement must be given every gain of the sketched pool exactly once; of the "
                    f"{wanted.sum():,} gains in its bins it was given {found.sum():,}"
                )


class _BinnedPool:
    """The levels of a pool, largest first: values of refined bins, and bins that are taken whole.

    `lows` and `highs` bound the gains of each level, `numbers` is a level's bin, or -1 for a single value.
    """

    def __init__(self, refinement: Refinement) -> None:
        sketch = refinement._sketch
        whole = np.flatnonzero(sketch.counts[FIRST_BIN:]) + FIRST_BIN
        whole = np.setdiff1d(whole, np.array(refinement.bins, np.int64), assume_unique=True)
        patterns, counts = refinement._used()
        values = patterns.view(np.float32)
        order = np.argsort(np.concatenate([whole << LOW_BITS, patterns]), kind="stable")[::-1]
        bin_reciprocals = (
            (sketch.counts[whole] - UNIT * sketch.deficits[whole]) / sketch.counts[whole] / bin_edges(whole)
        )
        means = 1.0 / np.concatenate([bin_reciprocals, reciprocals(values)])[order]
        self.counts = np.concatenate([sketch.counts[whole], counts])[order]
        self.lows = np.concatenate([bin_edges(whole), values.astype(np.float64)])[order]
        with np.errstate(over="ignore"):  # the end of the largest float32 is infinity, as it should be
            above = np.nextafter(values, np.float32(np.inf))
        self.highs = np.concatenate([bin_edges(whole + 1), above])[order]
        self.numbers = np.concatenate([whole, np.full(len(values), -1)])[order]
        self.is_summed = (self.numbers >= refinement.summed[0]) & (self.numbers < refinement.summed[1])
        self.size = sketch.count
        totals = self.counts * means
        summed = self.numbers[self.is_summed]
        ulps = bin_edges(summed + 1) - bin_edges(summed)
        totals[self.is_summed] = self.counts[self.is_summed] * self.lows[self.is_summed] + (
            refinement._lows[summed] * (ulps / (1 << LOW_BITS))
        )
        self.levels = Levels(means, self.counts, totals, self.size - int(self.counts.sum()))

    def open_bins(self, spending: Spending) -> tuple[set[int], tuple[int, int]]:
        """Find what keeps a solution from being exact: bins to refine, and bins to sum."""
        critical = np.array(spending.critical)[:, None]
        is_bin = self.numbers >= 0
        inside = is_bin & (self.lows <= critical) & (critical < self.highs)
        full = self.numbers[spending.shared : spending.full]
        unsummed = full[(full >= 0) & ~self.is_summed[spending.shared : spending.full]]
        if not inside.any() and not unsummed.size:
            return set(), (0, 0)
        near = is_bin & (self.lows <= critical * (1 + 2.0**-6)) & (critical * (1 - 2.0**-6) < self.highs)
        bins = {int(number) for number in self.numbers[near.any(axis=0)]}
        full = full[full >= 0]
        return bins, (int(full.min()), int(full.max()) + 1) if full.size else (0, 0)

    def threshold(self, spending: Spending, wrong: float, budget: int, refinement: Refinement | None) -> Threshold:
        """Express a spending on levels as a function of the gain."""
        shared, full = spending.shared, spending.full
        straddles = shared > 0 and self.lows[shared - 1] < spending.level
        apart = shared - 1 if straddles else shared
        share_from = self.lows[apart - 1] if apart else np.inf
        straddle_from = self.lows[shared - 1] if straddles else share_from
        full_from = self.lows[full - 1] if full > shared else straddle_from
        return Threshold(
            budget=budget,
            wrong=wrong,
            value=spending.value,
            level=spending.level,
            share_from=float(share_from),
            straddle_from=float(straddle_from),
            straddle=min(spending.level / float(self.levels.values[shared - 1]), 1.0) if straddles else 0.0,
            full_from=float(full_from),
            cut_from=float(self.lows[full] if spending.partial else full_from),
            cut=spending.partial,
            zero=spending.zero,
            exact=refinement is None,
            _refinement=refinement,
        )

    def uniform(self, wrong: float, budget: int) -> Threshold:
        """Buy by chance, because nothing can be guaranteed."""
        share = budget / self.size
        reason = f"uniform over the pool: {wrong:,g} wrong labels can cover all {self.levels.positive:,} positive gains"
        return Threshold(
            budget=budget,
            wrong=wrong,
            value=0.0,
            level=0.0,
            share_from=np.inf,
            straddle_from=np.inf,
            straddle=0.0,
            full_from=np.inf,
            cut_from=0.0,
            cut=share,
            zero=share,
            exact=True,
            fallback=reason,
        )


def _runs(bins: tuple[int, ...]) -> list[tuple[int, int]]:
    """Group sorted bins into runs of neighbours: first bin and number of bins."""
    runs: list[tuple[int, int]] = []
    for number in bins:
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _count_patterns(gains: Floats32, first: int, counts: Ints) -> None:
    """Count the bit patterns from `first` on."""
    found: list[npt.NDArray[np.uint32]] = []
    for chunk in chunks(gains):
        offsets = chunk.view(np.uint32) - np.uint32(first)  # below `first` it wraps around to a large number
        found.append(offsets[offsets < len(counts)])
        if sum(map(len, found)) >= _FLUSH:
            counts += np.bincount(np.concatenate(found), minlength=len(counts))
            found = []
    if found:
        counts += np.bincount(np.concatenate(found), minlength=len(counts))
