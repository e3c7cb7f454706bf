"""Greedy maximisation of a weighted facility location: sampled bounds say where to look, exact sums decide.

    maximise over S:   sum_j w_j max_{i in S} k(x_i, x_j),     k(x, y) = exp(-|x - y|^2 / radius)

A candidate i adds  sum_j w_j max(0, k(x_i, x_j) - c_j)  to a set that covers row j up to c_j. What it adds only shrinks as
others are chosen, so that every former value is a bound and most values are never computed again (Minoux 1978). The values
of all n candidates over all n rows would cost n^2; here a candidate starts from a bound out of a random part of the rows,

    w_i (1 - c_i) + (n - 1) / m (s + z sqrt((1 - m / (n - 1)) (q + t^2))),

s and q the sums of its contributions at the m references other than itself and of their squares, t the mean remaining weight
of a reference, for a candidate whose neighbourhood the sample has missed. Its own row counts once and exactly, so that the
bound does not depend on whether the candidate is a reference. Nothing is chosen by a bound: the candidate with the largest one
is summed over all rows first.

A row counts for a candidate only where that candidate would be its nearest centre, which with L centres is about one row in L.
These rows are kept with their similarities (`_KEPT` in all), so that a candidate is summed over the whole pool once and over its
own few rows after that. Time O(n m d) for the bounds and O(n d) for each candidate that is looked at; memory O(n d).

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
_AT_ONCE = 16  # candidates that are summed together
_KEPT = 2**26  # similarities kept of all candidates, 8 bytes each
_DEVIATIONS = 2.0  # z: with 0 the choice covers 1 % less where few references fall near a candidate, with 3 it costs half as much again


class FacilityLocation:
    """How far the rows are covered, and what candidates would add.

    Attributes:
      cover: float32 [n], c.
      looked_at: candidates that were summed over all rows so far.
    """

    def __init__(self, points: Floats32, weights: Floats, distances: Floats32 | None, radius: float) -> None:
        """Start from what is covered.

        Args:
          points: [n, d], candidates and rows.
          weights: [n], non-negative.
          distances: squared ones of the rows to the nearest point that covers; None where there is none.
          radius: of the kernel, in squared distance, > 0.
        """
        self.weights = weights.astype(np.float32)
        self.factors = _factors(points, radius)
        covered = np.full(len(points), -np.inf, np.float32) if distances is None else -distances / np.float32(radius)
        self.cover: Floats32 = np.exp(covered)
        # a row counts where the exponent is above this; one without weight nowhere
        self.floor: Floats32 = np.where(self.weights > 0, covered, np.inf).astype(np.float32)
        self.looked_at = 0
        self._near: dict[int, tuple[npt.NDArray[np.int32], Floats32]] = {}
        self._room = _KEPT

    def bounds(self, drawn: Indices) -> Floats:
        """Bound what each candidate would add, from a part of the rows; with all rows it is exact.

        Args:
          drawn: int64 [m], ascending, the references.

        Returns:
          float64 [n].
        """
        size, others = len(self.cover), max(1, len(self.cover) - 1)
        references, weights, cover = self.factors[drawn].T.copy(), self.weights[drawn], self.cover[drawn]
        place = np.full(size, -1)
        place[drawn] = np.arange(len(drawn))
        left = self.weights * (1 - self.cover)
        missed = float(left[drawn].mean()) ** 2
        found = np.empty(size)
        step = max(1, BLOCK_VALUES // len(drawn))
        for start in range(0, size, step):
            here = slice(start, start + step)
            near = np.exp(self._exponents(np.arange(size)[here], references))
            near -= cover
            np.maximum(near, 0, out=near)
            is_drawn = np.flatnonzero(place[here] >= 0)
            near[is_drawn, place[here][is_drawn]] = 0.0
            counted = np.maximum(1, len(drawn) - (place[here] >= 0)).astype(np.float64)
            sums = (near @ weights).astype(np.float64)
            squares = (np.square(near, out=near) @ weights**2).astype(np.float64)
            spread = np.sqrt(np.maximum(1 - counted / others, 0) * (squares + missed))
            found[here] = left[here] + others / counted * (sums + _DEVIATIONS * spread)
        return found

    def added(self, candidates: Indices) -> Floats:
        """Sum what each candidate would add over all rows, float64 [len(candidates)]."""
        new = np.array([i for i in candidates.tolist() if i not in self._near], np.int64)
        values = dict(zip(new.tolist(), self._look_at(new), strict=True))
        for candidate in candidates.tolist():
            if candidate not in values:
                rows, near = self._near[candidate]
                values[candidate] = self._sum(candidate, rows, near)
        return np.array([values[candidate] for candidate in candidates.tolist()])

    def choose(self, candidate: int) -> None:
        """Cover what a candidate covers."""
        rows, near = self._near.pop(candidate, (None, None))
        if rows is None or near is None:
            exponents = self._exponents(np.array([candidate]), self.factors.T)[0]
            rows = np.flatnonzero(exponents > self.floor).astype(np.int32)
            near = np.exp(exponents[rows])
        else:
            self._room += len(rows)
        self.cover[rows] = np.maximum(self.cover[rows], near)
        with np.errstate(divide="ignore"):
            self.floor[rows] = np.log(self.cover[rows])

    def _look_at(self, candidates: Indices) -> list[float]:
        values: list[float] = []
        step = max(1, min(_AT_ONCE, BLOCK_VALUES * 4 // len(self.cover)))
        for start in range(0, len(candidates), step):
            some = candidates[start : start + step]
            for candidate, exponents in zip(some.tolist(), self._exponents(some, self.factors.T), strict=True):
                rows = np.flatnonzero(exponents > self.floor).astype(np.int32)
                values.append(self._sum(candidate, rows, np.exp(exponents[rows])))
        self.looked_at += len(candidates)
        return values

    def _sum(self, candidate: int, rows: npt.NDArray[np.int32], near: Floats32) -> float:
        """Sum over the rows that count, and keep those that still do."""
        more = near - self.cover[rows]
        counts = more > 0
        if not counts.all():
            more = more[counts]
            kept, near = rows[counts], near[counts]
        else:
            kept = rows
        former = self._near.pop(candidate, None)
        self._room += 0 if former is None else len(former[0])
        if len(kept) <= self._room:
            self._near[candidate] = kept, near
            self._room -= len(kept)
        return float(self.weights[kept] @ more)

    def _exponents(self, candidates: Indices, right: Floats32) -> Floats32:
        """Compute -|x - y|^2 / radius, at most 0, float32 [candidates, others]; `right` holds the others' factors in columns."""
        left = self.factors[candidates]
        left[:, [-2, -1]] = left[:, [-1, -2]]
        exponents: Floats32 = left @ right
        return np.minimum(exponents, 0, out=exponents)


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
    # the largest bounds are made tight, a few at a time, until the largest of all is tight
    heap = [(-value, rank, 0 if exact else -1) for rank, value in enumerate(bounds[order].tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < budget:
        stale: list[int] = []
        while heap and heap[0][2] < len(chosen) and len(stale) < _AT_ONCE:
            stale.append(heapq.heappop(heap)[1])
        if stale:
            for value, rank in zip(objective.added(order[stale]).tolist(), stale, strict=True):
                heapq.heappush(heap, (-value, rank, len(chosen)))
            continue
        candidate = int(order[heapq.heappop(heap)[1]])
        chosen.append(candidate)
        objective.choose(candidate)
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
