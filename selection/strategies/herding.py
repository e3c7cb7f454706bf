"""Uncertainty herding: choose what covers the examples that the student is unsure of.

    maximise over S, |S| = b:   sum_j g_j max_{i in S or labelled} k(x_i, x_j),    k(x, y) = exp(-|x - y|^2 / r^2)

g_j is the gain of example j, x_j its embedding scaled to length 1. Choosing an example is worth what its label tells of its
neighbours, itself among them: near ones that are labelled or chosen already are worth little more. r^2 is the median
over the pool of the squared distance to the nearest labelled example, so that it shrinks as labels are bought: with few
labels the choice covers the pool, with many it approaches the largest gains. There is nothing to tune.

The objective is monotone and submodular, so that taking the best example one after the other reaches at least 1 - 1/e of
the optimum (Nemhauser, Wolsey, Fisher 1978). It is summed over all examples of the pool. In pools of more than `references`
examples a random part of them bounds what each candidate would add, and says which are worth summing (`facility_location`
has the bound and the cost).

References:
  Bae, Oliveira, Sutherland: Uncertainty Herding: One Active Learning Method for All Label Budgets, ICLR 2025, arXiv
  2412.20644. The radius is ours: theirs is the least distance between labelled examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import Floats
from distilbeam.selection.rounding import Bools, Indices
from distilbeam.selection.strategies.facility_location import FacilityLocation, Floats32, greedy, nearest, samples
from distilbeam.selection.strategies.selectors import CandidatePool, Selector, mask

_LEAST_RADIUS = 1e-6  # float32 does not tell nearer points of length 1 apart


@dataclass(frozen=True)
class Herding(Selector):
    """Choose what covers the uncertain examples best, one after the other; see `herd`.

    Attributes:
      gain: what an example's label is worth to the student, a key of `gains.GAINS`; unused where a pool brings its gains.
      references: in larger pools, so many random examples bound what a candidate adds before it is summed over all.
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
      rng: draws the references, and breaks ties.
      references: in larger pools, so many random examples bound what a candidate adds before it is summed over all.

    Returns:
      int64 [budget], distinct, in the order of their choice.
    """
    points, labelled = _of_length_one(points), _of_length_one(labelled)
    size = len(points)
    drawn = samples(size, references, rng)
    centres = labelled if len(labelled) else points[rng.integers(size)][None]
    distances = nearest(points, centres)
    radius = max(float(np.median(distances)), _LEAST_RADIUS)
    objective = FacilityLocation(points, gains, distances if len(labelled) else None, radius)
    return greedy(objective, objective.bounds(*drawn), size <= references, budget, rng.permutation(size))


def _of_length_one(points: npt.NDArray[np.floating]) -> Floats32:
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    scaled: Floats32 = (points / np.maximum(lengths, np.finfo(np.float32).tiny)).astype(np.float32)
    return scaled
