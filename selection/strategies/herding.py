"""Uncertainty herding: choose what covers the examples that the student is unsure of.

    maximise over S, |S| = b:   sum_j g_j max_{i in S or labelled} k(x_i, x_j),    k(x, y) = exp(-|x - y|^2 / r^2)

g_j is the gain of example j, x_j its embedding scaled to length 1. Choosing an example is worth what its label tells of its
neighbours, itself among them: near ones that are labelled or chosen already are worth little more. r^2 is the median
over the pool of the squared distance to the nearest labelled example, so that it shrinks as labels are bought: with few
labels the choice covers the pool, with many it approaches the largest gains. There is nothing to tune.

The objective is monotone and submodular, so that taking the best example one after the other reaches at least 1 - 1/e of
the optimum (Nemhauser, Wolsey, Fisher 1978). Bounds of former steps spare most evaluations (Minoux 1978). In pools of more
than `references` examples the sum runs over a random part of them, and each candidate counts itself besides. Time
O(n m d) for n examples, m references and d dimensions, then O(m d) an evaluation; memory O(n d + m d).

References:
  Bae, Oliveira, Sutherland: Uncertainty Herding: One Active Learning Method for All Label Budgets, ICLR 2025, arXiv
  2412.20644. The radius is ours: theirs is the least distance between labelled examples.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import Floats
from distilbeam.selection.rounding import Bools, Indices
from distilbeam.selection.strategies.selectors import CandidatePool, Selector, mask

Floats32 = npt.NDArray[np.float32]

_BLOCK_VALUES = 2**22  # similarities computed at a time
_AT_ONCE = 16  # bounds that are made tight together
_LEAST_RADIUS = 1e-6  # float32 does not tell nearer points of length 1 apart


@dataclass(frozen=True)
class Herding(Selector):
    """Choose what covers the uncertain examples best, one after the other; see `herd`.

    Attributes:
      gain: what an example's label is worth to the student, a key of `gains.GAINS`; unused where a pool brings its gains.
      references: most examples that the objective is summed over.
    """

    name: ClassVar[str] = "herding"
    reads: ClassVar[tuple[str, ...]] = ("gains", "embeddings")
    distributes: ClassVar[bool] = False
    limit: int | None = 1_000_000
    gain: str = "margin"
    references: int = 8192

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        gains = pool.gains_by(self.gain, self.name)
        points = pool.require_embeddings(self.name, None)  # float32 as they are kept: doubles would double the memory
        known = pool.centres(points.shape[1], None)
        return mask(herd(points, gains, known, budget, rng, self.references), pool.size)


def herd(
    points: npt.NDArray[np.floating],
    gains: Floats,
    labelled: npt.NDArray[np.floating],
    budget: int,
    rng: np.random.Generator,
    references: int = 8192,
) -> Indices:
    """Choose examples one after the other, each the one that adds the most uncertainty covered.

    Args:
      points: [n, d], embeddings of the pool.
      gains: float64 [n], non-negative.
      labelled: [m, d], embeddings of the examples that have a label; without any, the radius is the median distance to a
        random example of the pool.
      budget: how many to choose, at most n.
      rng: breaks ties, and draws the references.
      references: most examples that the objective is summed over.

    Returns:
      int64 [budget], distinct, in the order of their choice.
    """
    points, labelled = _of_length_one(points), _of_length_one(labelled)
    size = len(points)
    sampled = size > references
    drawn = np.sort(rng.choice(size, references, replace=False)) if sampled else np.arange(size)
    centres = labelled if len(labelled) else points[rng.integers(size)][None]
    nearest = _nearest(points[drawn], centres)
    radius = max(float(np.median(nearest)), _LEAST_RADIUS)
    weights = gains[drawn] * (size / len(drawn))
    cover = np.exp(-nearest / radius) if len(labelled) else np.zeros(len(nearest), np.float32)
    covered = _Covered(points, points[drawn], weights.astype(np.float32), cover, radius)
    own = [_Own(points, gains, labelled, radius, drawn, budget)] if sampled else []
    return _greedy([covered, *own], budget, rng.permutation(size))


class _Covered:
    """How far the references are covered, and what candidates would add."""

    def __init__(
        self, points: Floats32, references: Floats32, weights: Floats32, cover: Floats32, radius: float
    ) -> None:
        self.weights, self.cover = weights, cover
        self.left, self.right = _factors(points, radius)[0], _factors(references, radius)[1].T
        self.step = max(1, _BLOCK_VALUES // len(references))

    def added(self, candidates: Indices) -> Floats:
        """Compute the weight that each candidate would add, float64 [len(candidates)]."""
        parts = []
        for start in range(0, len(candidates), self.step):
            near = _similarities(self.left[candidates[start : start + self.step]], self.right)
            near -= self.cover
            parts.append(np.maximum(near, 0, out=near) @ self.weights)
        return np.concatenate(parts).astype(np.float64)

    def choose(self, candidate: int) -> None:
        """Cover what a candidate covers."""
        np.maximum(self.cover, _similarities(self.left[[candidate]], self.right)[0], out=self.cover)


class _Own:
    """What candidates that are no references count for themselves."""

    def __init__(
        self, points: Floats32, gains: Floats, labelled: Floats32, radius: float, references: Indices, budget: int
    ) -> None:
        self.points, self.gains, self.radius = points, gains.copy(), radius
        self.gains[references] = 0.0
        self.cover = (
            np.exp(-_nearest(points, labelled) / radius) if len(labelled) else np.zeros(len(points), np.float32)
        )
        self.chosen, self.count = np.empty((budget, points.shape[1]), np.float32), 0

    def added(self, candidates: Indices) -> Floats:
        """Compute the gain of each candidate that nothing covers yet, float64 [len(candidates)]."""
        cover = self.cover[candidates]
        if self.count:
            near = np.exp(-_nearest(self.points[candidates], self.chosen[: self.count]) / self.radius)
            cover = np.maximum(cover, near)
        left: Floats = self.gains[candidates] * (1.0 - cover)
        return left

    def choose(self, candidate: int) -> None:
        """Cover what is near a candidate."""
        self.chosen[self.count] = self.points[candidate]
        self.count += 1


def _greedy(objective: Sequence[_Covered | _Own], budget: int, order: Indices) -> Indices:
    """Take the best candidate one after the other; among equals the first in `order`.

    What a candidate adds only shrinks as others are chosen, so that a value of a former step is a bound. The largest bounds
    are made tight, a few at a time, until the largest of all is tight.
    """

    def added(candidates: Indices) -> Floats:
        return sum((part.added(candidates) for part in objective), np.zeros(len(candidates)))

    heap = [(-value, rank, 0) for rank, value in enumerate(added(order).tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < budget:
        stale: list[int] = []
        while heap and heap[0][2] < len(chosen) and len(stale) < _AT_ONCE:
            stale.append(heapq.heappop(heap)[1])
        if stale:
            for value, rank in zip(added(order[stale]).tolist(), stale, strict=True):
                heapq.heappush(heap, (-value, rank, len(chosen)))
            continue
        candidate = int(order[heapq.heappop(heap)[1]])
        chosen.append(candidate)
        for part in objective:
            part.choose(candidate)
    return np.array(chosen, np.int64)


def _of_length_one(points: npt.NDArray[np.floating]) -> Floats32:
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    scaled: Floats32 = (points / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return scaled


def _factors(points: Floats32, radius: float) -> tuple[Floats32, Floats32]:
    """Give the factors whose product is -|x - y|^2 / radius: (s x, -|s x|^2 / 2, 1) and (s y, 1, -|s y|^2 / 2), s^2 = 2 / radius."""
    scaled = np.float32(np.sqrt(2 / radius)) * points
    halves = -(scaled**2).sum(axis=1, keepdims=True) / 2
    ones = np.ones_like(halves)
    return np.hstack([scaled, halves, ones]), np.hstack([scaled, ones, halves])


def _similarities(left: Floats32, right: Floats32) -> Floats32:
    """Compute exp(-|x - y|^2 / radius), float32 [points, others], from their factors; `right` is transposed."""
    exponents: Floats32 = left @ right
    np.minimum(exponents, 0, out=exponents)
    return np.exp(exponents, out=exponents)


def _nearest(points: Floats32, others: Floats32) -> Floats32:
    """Compute the squared distance of each point to the nearest of the others, float32 [points]."""
    step = max(1, _BLOCK_VALUES // len(others))
    blocks = (points[start : start + step] for start in range(0, len(points), step))
    return np.concatenate([_squared_distances(block, others).min(axis=1) for block in blocks])


def _squared_distances(points: Floats32, others: Floats32) -> Floats32:
    squares = (points**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)
    distances: Floats32 = np.maximum(squares - 2 * (points @ others.T), 0)
    return distances
