"""Greedy maximisation of a weighted facility location: sampled bounds say where to look, exact sums decide.

    maximise over S:   sum_j w_j max_{i in S} k(x_i, x_j),     k(x, y) = exp(-|x - y|^2 / radius)

A candidate i adds  sum_j w_j max(0, k(x_i, x_j) - c_j)  to a set that covers row j up to c_j. What it adds only shrinks as
others are chosen, so that every former value is a bound and most values are never computed again (Minoux 1978). The values
of all n candidates over all n rows would cost n^2; here a candidate starts from a bound out of a random part of the rows,

    w_i (1 - c_i) + (n - 1) / m (s + z sqrt((1 - m / (n - 1)) (q + t^2))),

s the sum of its contributions at the m references other than itself, q that of their squares, t the mean remaining weight of
a reference, for a candidate whose neighbourhood the sample has missed. Its own row counts once and exactly, so that the bound
does not depend on whether the candidate is a reference. Nothing is chosen by a bound: the largest ones are computed again
for what is covered by now, and the candidate that still has the largest one is summed over all rows. In a pool of
10^6 rows a sum costs as much as bounds of a hundred candidates: where the pool has 4 x `_FINER` times the references or more, the
candidate is first bounded by `_FINER` times as many, which is closer, and is summed when that bound too is the largest.

A row counts for a candidate only where that candidate would be its nearest centre, which with L centres is about one row in L.
These rows are kept with their similarities, so that a bound or a sum is computed again from a few numbers. Time O(n m d) for
the first bounds and O(n d) for each candidate that is summed; memory O(n d) and what `_KEPT` allows.

References:
  Nemhauser, Wolsey, Fisher: An analysis of approximations for maximizing submodular set functions, 1978; Minoux: Accelerated
  greedy algorithms, 1978. The sampled bounds are this project's.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import Floats
from distilbeam.selection.rounding import Indices

Floats32 = npt.NDArray[np.float32]

BLOCK_VALUES = 2**22  # similarities computed at a time
_AT_ONCE = 8  # candidates that are summed over all rows together
_FINER = 8  # a sample of references is so many times as large as the one before it
_KEPT = 2**26  # similarities kept for bounds, and as many for sums, 12 bytes each with their rows
# z: the higher, the more candidates are summed over all rows and the less a good one is passed over by a low bound. With 0, 0.25
# and 0.5 a choice of 500 of 8,000 rows covers 93.6, 99.9 and 100 % of what all rows as references cover, after sums for 1,395, 5,944
# and 8,000 candidates (benchmarks/herding.py --pools synthetic --rows 8000 --references 1000 --deviations 0 0.25 0.5, one seed)
DEVIATIONS = 0.25

_Cell = tuple[npt.NDArray[np.int64], Floats32]  # rows that count for a candidate, and its similarities to them


class FacilityLocation:
    """How far the rows are covered, and what candidates would add.

    Attributes:
      cover: float32 [n], c.
      looked_at: candidates that were summed over all rows so far.
    """

    def __init__(
        self,
        points: Floats32,
        weights: Floats,
        distances: Floats32 | None,
        radius: float,
        deviations: float | None = None,
    ) -> None:
        """Start from what is covered.

        Args:
          points: [n, d], candidates and rows.
          weights: [n], non-negative.
          distances: squared ones of the rows to the nearest point that covers; None where there is none.
          radius: of the kernel, in squared distance, > 0.
          deviations: z of the bounds, >= 0; `DEVIATIONS` without it.
        """
        self.deviations = DEVIATIONS if deviations is None else deviations
        self.weights = weights.astype(np.float32)
        self.factors = _factors(points, radius)
        covered = np.full(len(points), -np.inf, np.float32) if distances is None else -distances / np.float32(radius)
        self.cover: Floats32 = np.exp(covered)
        # a row counts where the exponent is above this; one without weight nowhere
        self.floor: Floats32 = np.where(self.weights > 0, covered, np.inf).astype(np.float32)
        self.looked_at = 0
        self._sums, self._bounds = _Cells(), _Cells()
        self._samples: list[_Sample] = []

    @property
    def finest(self) -> int:
        """The number of the largest sample of references."""
        return len(self._samples) - 1

    def at_once(self, sample: int) -> int:
        """How many candidates are bounded together by a sample."""
        return max(_AT_ONCE, BLOCK_VALUES // len(self._samples[sample].rows))

    def bounds(self, drawn: Indices, *finer: Indices) -> Floats:
        """Bound what each candidate adds at first, from a part of the rows; with all rows the bounds are the values.

        Args:
          drawn: int64 [m], the references.
          finer: larger samples of references, for `refined`.

        Returns:
          float64 [n].
        """
        self._samples = [_Sample(rows, self.factors, self.weights * (1 - self.cover)) for rows in (drawn, *finer)]
        found, step = np.empty(len(self.cover)), max(1, BLOCK_VALUES // len(drawn))
        for start in range(0, len(found), step):
            found[start : start + step] = self.refined(np.arange(start, min(start + step, len(found))), 0)
        return found

    def bound(self, candidate: int, sample: int = 0) -> float:
        """Bound what a candidate adds to what is covered by now, by the sample that bounded it before."""
        cell = self._bounds.get(candidate)
        if cell is None:
            return float(self.refined(np.array([candidate]), sample)[0])
        rows, near = cell
        more = self.weights[rows] * np.maximum(near - self.cover[rows], 0)
        return float(self._bound(self._samples[sample], np.array([candidate]), more.sum(), more @ more)[0])

    def refined(self, candidates: Indices, sample: int) -> Floats:
        """Bound what candidates add by a sample of references, float64 [len(candidates)]; keep the ones that count for them."""
        drawn = self._samples[sample].rows
        exponents = self._exponents(candidates, self._samples[sample].factors)
        where = np.flatnonzero(exponents > self.floor[drawn])
        which, rows = where // len(drawn), drawn[where % len(drawn)]
        near = np.exp(exponents.ravel()[where])
        others = rows != candidates[which]
        which, rows, near = which[others], rows[others], near[others]
        more = (self.weights[rows] * np.maximum(near - self.cover[rows], 0)).astype(np.float64)
        ends = np.searchsorted(which, np.arange(len(candidates) + 1))
        for number, candidate in enumerate(candidates.tolist()):
            here = slice(ends[number], ends[number + 1])
            self._bounds.keep(candidate, rows[here], near[here])
        sums, squares = (np.bincount(which, values, len(candidates)).astype(np.float64) for values in (more, more**2))
        return self._bound(self._samples[sample], candidates, sums, squares)

    def added(self, candidates: Indices) -> Floats:
        """Sum what each candidate would add over all rows, float64 [len(candidates)]."""
        values = np.empty(len(candidates))
        new = np.array([self._sums.get(candidate) is None for candidate in candidates.tolist()], bool)
        for place in np.flatnonzero(~new).tolist():
            values[place] = self._sum(int(candidates[place]), *self._sums.take(int(candidates[place])))
        values[new] = self._look_at(candidates[new])
        return values

    def choose(self, candidate: int) -> None:
        """Cover what a candidate covers."""
        cell = self._sums.get(candidate)
        rows, near = self._rows_of(self._exponents(np.array([candidate]), self.factors.T)[0]) if cell is None else cell
        self.cover[rows] = np.maximum(self.cover[rows], near)
        with np.errstate(divide="ignore"):
            self.floor[rows] = np.log(self.cover[rows])
        self._sums.drop(candidate)
        self._bounds.drop(candidate)

    def _look_at(self, candidates: Indices) -> list[float]:
        values: list[float] = []
        for start in range(0, len(candidates), _AT_ONCE):
            some = candidates[start : start + _AT_ONCE]
            for candidate, exponents in zip(some.tolist(), self._exponents(some, self.factors.T), strict=True):
                values.append(self._sum(candidate, *self._rows_of(exponents)))
                self._bounds.drop(candidate)  # its sum is known, and a sum is never again a bound
        self.looked_at += len(candidates)
        return values

    def _sum(self, candidate: int, rows: npt.NDArray[np.int64], near: Floats32) -> float:
        """Sum over the rows that count, and keep those that still do."""
        more = near - self.cover[rows]
        counts = more > 0
        self._sums.keep(candidate, rows[counts], near[counts])
        return float(self.weights[rows[counts]] @ more[counts])

    def _rows_of(self, exponents: Floats32) -> _Cell:
        rows = np.flatnonzero(exponents > self.floor)
        return rows, np.exp(exponents[rows])

    def _bound(self, sample: _Sample, candidates: Indices, sums: Floats, squares: Floats) -> Floats:
        others = max(1, len(self.cover) - 1)
        counted = np.maximum(1, len(sample.rows) - sample.holds[candidates])
        spread = np.sqrt(np.maximum(1 - counted / others, 0) * (squares + sample.missed))
        own = self.weights[candidates] * (1 - self.cover[candidates])
        return np.asarray(own + others / counted * (sums + self.deviations * spread), np.float64)

    def _exponents(self, candidates: Indices, right: Floats32) -> Floats32:
        """Compute -|x - y|^2 / radius, at most 0, float32 [candidates, others]; `right` holds the others' factors in columns."""
        left = self.factors[candidates]
        left[:, [-2, -1]] = left[:, [-1, -2]]
        exponents: Floats32 = left @ right
        return np.minimum(exponents, 0, out=exponents)


class _Sample:
    """References: rows that stand for all when a candidate is bounded.

    Attributes:
      rows: int64 [m].
      factors: float32 [d + 2, m].
      holds: bool [n], whether a row is a reference.
      missed: t^2, of the weight that is left to cover.
    """

    def __init__(self, rows: Indices, factors: Floats32, left: Floats32) -> None:
        self.rows, self.factors = rows, factors[rows].T.copy()
        self.holds = np.zeros(len(factors), bool)
        self.holds[rows] = True
        self.missed = float(left[rows].mean()) ** 2


class _Cells:
    """Rows that count for candidates and similarities to them, up to `_KEPT`; those that find no room are computed again."""

    def __init__(self) -> None:
        self._cells: dict[int, _Cell] = {}
        self._room = _KEPT

    def get(self, candidate: int) -> _Cell | None:
        return self._cells.get(candidate)

    def take(self, candidate: int) -> _Cell:
        cell = self._cells.pop(candidate)
        self._room += len(cell[0])
        return cell

    def drop(self, candidate: int) -> None:
        if candidate in self._cells:
            self.take(candidate)

    def keep(self, candidate: int, rows: npt.NDArray[np.int64], near: Floats32) -> None:
        self.drop(candidate)
        if len(rows) <= self._room:
            self._cells[candidate] = rows, near
            self._room -= len(rows)


def samples(size: int, references: int, rng: np.random.Generator) -> list[Indices]:
    """Draw the references that bound candidates, each sample a part of the next; the largest is a quarter of the rows at most.

    Args:
      size: n, of the pool.
      references: m, of the first sample; a pool that is not larger is its own.
      rng: draws them.

    Returns:
      int64 [m], [`_FINER` m], ... in ascending order.
    """
    if size <= references:
        return [np.arange(size)]
    found = [np.sort(rng.choice(size, references, replace=False))]
    while _FINER * len(found[-1]) <= size // 4:
        others = np.setdiff1d(np.arange(size), found[-1], assume_unique=True)
        more = rng.choice(others, (_FINER - 1) * len(found[-1]), replace=False)
        found.append(np.sort(np.concatenate([found[-1], more])))
    return found


_VALUE = -1  # of what is no bound; bounds have the number of their sample


def greedy(objective: FacilityLocation, bounds: Floats, exact: bool, budget: int, order: Indices) -> Indices:
    """Take the best candidate one after the other; among equals the first in `order`.

    Args:
      objective: what is covered; changed by the call.
      bounds: float64 [n], of what each candidate adds at first.
      exact: whether the bounds are the values themselves.
      budget: how many to take, at most n.
      order: a permutation of the candidates.

    Returns:
      int64 [budget], in the order of their choice.
    """
    heap = [(-value, rank, 0, _VALUE if exact else 0) for rank, value in enumerate(bounds[order].tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < budget:
        value, rank, step, kind = heapq.heappop(heap)
        candidate = int(order[rank])
        if kind == _VALUE and step == len(chosen):
            chosen.append(candidate)
            objective.choose(candidate)
        elif step < len(chosen) and (exact or kind != _VALUE):
            value = objective.bound(candidate, max(kind, 0))
            heapq.heappush(heap, (-value, rank, len(chosen), kind))
        else:
            closer = kind + 1 if _VALUE < kind < objective.finest else _VALUE
            many = _AT_ONCE if closer == _VALUE else objective.at_once(closer)
            ranks = [
                rank
            ]  # those that follow are wanted soon, and together they cost one pass over the sample or the pool
            while heap and len(ranks) < many and heap[0][2:] == (step, kind):
                ranks.append(heapq.heappop(heap)[1])
                while heap and _VALUE < heap[0][3] == kind < objective.finest and heap[0][2] < step:
                    _, stale, _, _ = heap[0]
                    heapq.heapreplace(heap, (-objective.bound(int(order[stale]), kind), stale, step, kind))
            found = objective.added(order[ranks]) if closer == _VALUE else objective.refined(order[ranks], closer)
            for value, rank in zip(found.tolist(), ranks, strict=True):
                heapq.heappush(heap, (-value, rank, len(chosen), closer))
    return np.array(chosen, np.int64)


def nearest(points: Floats32, others: Floats32) -> Floats32:
    """Compute the squared distance of each point to the nearest of the others, float32 [points]."""
    step = max(1, BLOCK_VALUES // len(others))
    blocks = (points[start : start + step] for start in range(0, len(points), step))
    return np.concatenate([_squared_distances(block, others).min(axis=1) for block in blocks])


def _squared_distances(points: Floats32, others: Floats32) -> Floats32:
    squares = (points**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)
    distances: Floats32 = np.maximum(squares - 2 * (points @ others.T), 0)
    return distances


def _factors(points: Floats32, radius: float) -> Floats32:
    """Give (s y, 1, -|s y|^2 / 2), s^2 = 2 / radius: its product with (s x, -|s x|^2 / 2, 1) is -|x - y|^2 / radius."""
    scaled = np.float32(np.sqrt(2 / radius)) * points
    halves = -(scaled**2).sum(axis=1, keepdims=True) / 2
    return np.hstack([scaled, np.ones_like(halves), halves])
