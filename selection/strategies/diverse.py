"""Selectors that compare examples with each other: k-center, cluster-margin and BADGE.

They need the examples in memory and refuse larger pools.

References:
  Sener, Savarese: Active Learning for Convolutional Neural Networks: A Core-Set Approach, ICLR 2018, arXiv 1708.00489.
  Citovsky et al.: Batch Active Learning at Scale, NeurIPS 2021, arXiv 2107.14263 (cluster-margin).
  Ash, Zhang, Krishnamurthy, Langford, Agarwal: Deep Batch Active Learning by Diverse, Uncertain Gradient Lower Bounds,
  ICLR 2020, arXiv 1906.03671 (BADGE).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from scipy.special import softmax
from sklearn.cluster import AgglomerativeClustering

from distilbeam.selection.checks import Floats
from distilbeam.selection.rounding import Bools, Indices
from distilbeam.selection.strategies.selectors import CandidatePool, Selector, mask


@dataclass(frozen=True)
class KCenter(Selector):
    """Choose, one after the other, the example farthest from all labelled and chosen ones (greedy k-center, a 2-approximation).

    Without labelled examples the first one is drawn by chance. Time O(n (budget + labelled) d), memory O(n d).
    """

    name: ClassVar[str] = "k-center"
    reads: ClassVar[tuple[str, ...]] = ("embeddings",)
    distributes: ClassVar[bool] = False
    limit: int | None = 1_000_000

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        points = pool.require_embeddings(self.name)
        nearest = np.full(pool.size, np.inf)
        for centre in pool.centres(points.shape[1]):
            np.minimum(nearest, _squared_distances(points, centre), out=nearest)
        chosen = np.zeros(pool.size, bool)
        for _ in range(budget):
            farthest = int(rng.integers(pool.size)) if np.isinf(nearest[0]) else int(nearest.argmax())
            chosen[farthest] = True
            np.minimum(nearest, _squared_distances(points, points[farthest]), out=nearest)
            nearest[farthest] = -1.0  # below every distance: among coincident points each is chosen once
        return chosen


@dataclass(frozen=True)
class ClusterMargin(Selector):
    """Choose small margins, in turn from clusters, the smallest clusters first.

    The `oversampling` times budget examples of smallest margin are clustered by average linkage, and the clusters are visited
    in the order of their size, one random member at a time. (The paper clusters the whole pool once; clustering only the
    candidates needs memory for their squared number alone.)

    Attributes:
      oversampling: candidates for each example of the budget.
      cluster_size: mean number of candidates in a cluster.
      candidate_limit: largest number of candidates, whose squared number of distances is held in memory.
      gain: a key of `gains.GAINS`, small margins being large gains.
    """

    name: ClassVar[str] = "cluster-margin"
    reads: ClassVar[tuple[str, ...]] = ("gains", "embeddings")
    distributes: ClassVar[bool] = False
    oversampling: float = 10.0
    cluster_size: float = 10.0
    candidate_limit: int = 20_000
    gain: str = "margin"

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        if budget > self.candidate_limit:
            raise ValueError(
                f"budget must be at most the {self.candidate_limit:,} candidates that {self.name} clusters in memory, got {budget:,}"
            )
        gains = pool.gains_by(self.gain, self.name)
        points = pool.require_embeddings(self.name)
        count = min(max(int(self.oversampling * budget), budget), pool.size, self.candidate_limit)
        candidates = np.lexsort((rng.random(pool.size), -gains))[:count]
        clusters = _clusters(points[candidates], max(1, round(count / self.cluster_size)))
        return mask(candidates[_in_turn(clusters, rng)[:budget]], pool.size)


@dataclass(frozen=True)
class Badge(Selector):
    """Choose by k-means++ seeding on the gradients that the student's own prediction would give its last layer.

    The gradient of example x is (f(x) - one-hot of its top class) outer h(x), f the probabilities and h the embedding. It is
    never formed: distances follow from the two factors. The first example is drawn by chance, each next one in proportion to
    its squared distance from the nearest chosen one. Time O(n budget (C + d)), memory O(n (C + d)).
    """

    name: ClassVar[str] = "badge"
    reads: ClassVar[tuple[str, ...]] = ("logits", "embeddings")
    distributes: ClassVar[bool] = False
    limit: int | None = 1_000_000

    def _select(self, pool: CandidatePool, budget: int, rng: np.random.Generator) -> Bools:
        logits = pool.require_logits(self.name)
        hidden = pool.require_embeddings(self.name)
        residual = softmax(logits, axis=1)
        residual[np.arange(pool.size), logits.argmax(axis=1)] -= 1.0
        norms = (residual**2).sum(axis=1) * (hidden**2).sum(axis=1)

        def squared_distances(chosen: int) -> Floats:
            products = (residual @ residual[chosen]) * (hidden @ hidden[chosen])
            return np.asarray(np.maximum(norms + norms[chosen] - 2 * products, 0.0))

        return mask(spread_by_distance(pool.size, budget, squared_distances, rng), pool.size)


def spread_by_distance(
    size: int, budget: int, squared_distances: Callable[[int], Floats], rng: np.random.Generator
) -> Indices:
    """Draw points in proportion to the squared distance from the nearest drawn one (k-means++ seeding).

    Args:
      size: number of points.
      budget: number to draw, at most `size`.
      squared_distances: gives float64 [size], the squared distances of all points from one.
      rng: draws the points, the first one uniformly.

    Returns:
      int64 [budget], distinct; where only coincident points are left, these are drawn alike.
    """
    drawn = [int(rng.integers(size))]
    nearest = squared_distances(drawn[0])
    nearest[drawn[0]] = 0.0
    left = np.ones(size, bool)
    left[drawn[0]] = False
    while len(drawn) < budget:
        masses = nearest if nearest.any() else left.astype(np.float64)
        sums = np.cumsum(masses)
        point = int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))
        drawn.append(point)
        np.minimum(nearest, squared_distances(point), out=nearest)
        nearest[point], left[point] = 0.0, False
    return np.array(drawn)


def _squared_distances(points: Floats, centre: Floats) -> Floats:
    return np.asarray(((points - centre) ** 2).sum(axis=1))


def _clusters(points: Floats, count: int) -> npt.NDArray[np.int64]:
    if count >= len(points):
        return np.arange(len(points))
    return np.asarray(AgglomerativeClustering(n_clusters=count, linkage="average").fit_predict(points), np.int64)


def _in_turn(clusters: npt.NDArray[np.int64], rng: np.random.Generator) -> Indices:
    """Order points by rounds over the clusters, smallest cluster first, a random member each time."""
    sizes = np.bincount(clusters)
    shuffled = np.lexsort((rng.random(len(clusters)), clusters))
    starts = np.cumsum(sizes) - sizes
    turns = np.arange(len(clusters)) - starts[clusters[shuffled]]
    order = np.lexsort((clusters[shuffled], sizes[clusters[shuffled]], turns))
    return np.asarray(shuffled[order])
