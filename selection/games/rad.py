"""Robust Active Distillation: which examples to buy labels for when the teacher is sometimes wrong.

A pool of n unlabelled points has gains g_i >= 0. The teacher is wrong on k of the points, an adversary chooses which, and a
wrong point pays nothing. The sampling distribution that guarantees most,

    V(k) = max_p  min_{|S|=k}  sum_{i not in S} p_i g_i,

makes p_i g_i equal on its support, so a lower gain gets a higher probability there: with the gains in decreasing order,
H_I = sum_{j<=I} 1/g_j, F_I = (I - k) / H_I and I* the first maximiser of F,

    p_i = (1/g_i) / H_{I*} for i <= I*, else 0;     V = F_{I*}.

This module solves the game exactly by sorting, in O(n log n) time and O(n) memory; `distilbeam.selection.sketch.gain_sketch` solves it
for pools that no machine holds. Points of equal gain get equal probabilities throughout.

References:
  Baykal, Trinh, Iliopoulos, Menghani, Vee: Robust Active Distillation, ICLR 2023, arXiv 2210.01213. The closed form, the
  bounded form for a batch and the form with losses were derived for this project and are tested against linear programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsFloat, SupportsIndex

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import Floats, as_budget, as_gains, as_wrong, require_each, require_same_length
from distilbeam.selection.sketch.levels import Levels, Spending, solve_levels, support_end


@dataclass(frozen=True)
class RadSolution:
    """An optimal strategy of the buyer of labels.

    Attributes:
      probabilities: float64 [n], in the order of the gains: the sampling distribution (sums to 1) or the probabilities of
        being bought (sum to the budget).
      value: the gain that is guaranteed whichever points the teacher gets wrong, in the unit of the gains.
      support: I*, the number of points with a positive probability.
      fallback: why another rule than the game's was used, empty if none was.
    """

    probabilities: Floats
    value: float
    support: int
    fallback: str = ""


def rad_distribution(gains: npt.ArrayLike, wrong: SupportsFloat) -> RadSolution:
    """Find the sampling distribution that guarantees most when `wrong` labels are wrong.

    Args:
      gains: float [n], >= 0; any range, float32 or float64.
      wrong: k >= 0, the number of wrong labels; real, because it is an estimate. 0 is greedy: all mass on the top gain.

    Returns:
      The distribution, its guaranteed gain V(k) and support I*. If k is at least the number of positive gains, nothing can
      be guaranteed: the value is 0, the distribution uniform over the pool, and `fallback` says so.

    Raises:
      ValueError: gains are empty, not in one dimension, negative, NaN or infinite; or k is negative or not finite.

    Example:
      >>> rad_distribution([4.0, 3.0, 2.0, 1.0], wrong=1)
      RadSolution(probabilities=array([0.23076923, 0.30769231, 0.46153846, 0.        ]), value=1.8461538461538463, support=3, fallback='')

    References:
      arXiv 2210.01213, the max-min problem of its section on the sampling distribution.
    """
    array, wrong = as_gains(gains), as_wrong(wrong)
    pool = _levels(array)
    if wrong >= pool.positive:
        return _uniform(len(array), 1, wrong, pool.positive)
    end = support_end(pool.values, pool.counts, pool.values, wrong)
    least, points = pool.values[end - 1], int(pool.counts[:end].sum())
    ratios = pool.ratio_sum(least, end)
    probabilities = _shared(array, least, float(least)) / ratios
    return RadSolution(probabilities, float(least * ((points - wrong) / ratios)), points)


def rad_marginals(gains: npt.ArrayLike, wrong: SupportsFloat, budget: SupportsIndex) -> RadSolution:
    """Find the probabilities of buying each point, without replacement, that guarantee most.

    The optimum of the game with q_i <= 1 and sum q = b. It is b times the distribution of `rad_distribution` where that
    stays below 1; elsewhere it is not min(1, b p), which gives up a fifth of the guarantee on typical capped pools.
    The optimum need not be unique: points of equal gain share equally, and what the game leaves over in a pool that is
    nearly bought out raises the common level of q_i g_i.

    Args:
      gains: float [n], >= 0.
      wrong: k >= 0, the number of wrong labels in the pool; real.
      budget: b, whole number of labels to buy, between 1 and n.

    Returns:
      The probabilities (sum b, each in [0, 1]), the guaranteed gain V_b and the number of points with a positive one. If k
      is at least the number of positive gains, every point gets b / n and `fallback` says so.

    Raises:
      ValueError: as for `rad_distribution`, or the budget is not a whole number between 1 and n.

    Example:
      >>> rad_marginals([4.0, 3.0, 2.0, 1.0], wrong=1, budget=3).probabilities
      array([0.75, 1.  , 1.  , 0.25])

    References:
      arXiv 2210.01213; the solution under q <= 1 is this project's (see `distilbeam.selection.sketch.levels`).
    """
    array, wrong = as_gains(gains), as_wrong(wrong)
    budget = as_budget(budget, len(array))
    pool = _levels(array)
    spending = solve_levels(pool, wrong, budget)
    if spending is None:
        return _uniform(len(array), budget, wrong, pool.positive)
    probabilities = _spent(array, pool, spending)
    return RadSolution(probabilities, spending.value, int(np.count_nonzero(probabilities)))


def rad_loss_distribution(gains: npt.ArrayLike, losses: npt.ArrayLike | None, wrong: SupportsFloat) -> RadSolution:
    """Find the sampling distribution that guarantees most when a wrong label also costs something.

    A wrong point pays -l_i instead of 0. With w_i = g_i + l_i and the points in decreasing order of g (not of w):
    F_I = (sum_{j<=I} g_j/w_j - k) / sum_{j<=I} 1/w_j, and p_i is proportional to 1/w_i on the first I* points.

    Args:
      gains: float [n], >= 0.
      losses: float [n], >= 0, what a wrong label costs; one number for all points; or None for the median gain.
      wrong: k >= 0, the number of wrong labels; real.

    Returns:
      The distribution, its guaranteed gain (negative if the losses outweigh it) and its support. If k is so large that the
      game pays less than -min l, which drawing the cheapest point alone would pay, the distribution is that of
      `rad_distribution`, `value` is what it guarantees in this game, and `fallback` says so.

    Raises:
      ValueError: as for `rad_distribution`; or losses are negative, not finite, or of another length than the gains.

    Example:
      >>> rad_loss_distribution([0.9, 0.8, 0.5, 0.2], [0.1, 0.2, 0.5, 0.8], wrong=1).probabilities
      array([0.33333333, 0.33333333, 0.33333333, 0.        ])

    References:
      arXiv 2210.01213, RAD-Loss; the closed form is this project's.
    """
    array, wrong = np.asarray(as_gains(gains), np.float64), as_wrong(wrong)
    losses = _losses(array, losses)
    costs = array + losses
    order = np.argsort(-array, kind="stable")
    order = order[costs[order] > 0]
    if order.size == 0:
        return _plain(array, losses, wrong)
    end = support_end(array[order], np.ones(order.size, np.int64), costs[order], wrong)
    bought = order[:end]
    least = costs[bought].min()
    ratios = least / costs[bought]
    value = float(least * (((array[bought] / costs[bought]).sum() - wrong) / ratios.sum()))
    if value < -losses.min():
        return _plain(array, losses, wrong)
    probabilities = np.zeros(len(array))
    probabilities[bought] = ratios / ratios.sum()
    return RadSolution(probabilities, value, end)


def guaranteed_gain(
    gains: npt.ArrayLike, probabilities: npt.ArrayLike, wrong: SupportsFloat, losses: npt.ArrayLike = 0.0
) -> float:
    """Compute what probabilities guarantee when an adversary makes the worst `wrong` labels wrong.

    Args:
      gains: float [n], >= 0.
      probabilities: float [n], >= 0, of drawing or of buying each point.
      wrong: k >= 0; the fraction of a real k takes its share of the next worst point. Above n it means all points.
      losses: float [n] or one number, >= 0: what a wrong label costs.

    Returns:
      sum p_i g_i minus the k largest p_i (g_i + l_i), in the unit of the gains.

    Raises:
      ValueError: an argument is negative, not finite, or of another length.

    Example:
      >>> guaranteed_gain([4.0, 3.0, 2.0, 1.0], [1.0, 0.0, 0.0, 0.0], wrong=1)
      0.0
    """
    array, wrong = np.asarray(as_gains(gains), np.float64), as_wrong(wrong)
    weights = np.asarray(as_gains(probabilities, "probabilities"), np.float64)
    require_same_length(gains=array, probabilities=weights)
    stakes = np.sort(weights * (array + _losses(array, losses)))[::-1]
    whole = min(int(wrong), len(stakes))
    part = (wrong - whole) * stakes[whole] if whole < len(stakes) else 0.0
    return float((weights * array).sum() - stakes[:whole].sum() - part)


def _levels(gains: npt.NDArray[np.floating]) -> Levels:
    values, counts = np.unique(gains, return_counts=True)
    zeros = int(counts[0]) if values[0] == 0 else 0
    first = 1 if zeros else 0
    values, counts = values[first:][::-1].astype(np.float64), counts[first:][::-1].astype(np.int64)
    return Levels(values, counts, values * counts, zeros)


def _shared(gains: npt.NDArray[np.floating], least: float, level: float) -> Floats:
    """Give level / gain to gains of at least `least` and 0 to the others."""
    shares = np.zeros(len(gains))
    np.divide(level, gains, out=shares, where=gains >= least, dtype=np.float64)
    return shares


def _spent(gains: npt.NDArray[np.floating], pool: Levels, spending: Spending) -> Floats:
    least_shared = pool.values[spending.shared - 1] if spending.shared else np.inf
    least_full = pool.values[spending.full - 1] if spending.full else np.inf
    q = _shared(gains, least_shared, spending.level)
    np.minimum(q, 1.0, out=q)
    q[(gains >= least_full) & (gains < least_shared)] = 1.0
    if spending.partial:
        q[gains == pool.values[spending.full]] = spending.partial
    if spending.zero:
        q[gains == 0] = spending.zero
    return q


def _uniform(points: int, budget: int, wrong: float, positive: int) -> RadSolution:
    reason = f"uniform over the pool: {wrong:,g} wrong labels can cover all {positive:,} positive gains"
    return RadSolution(np.full(points, budget / points), 0.0, points, reason)


def _plain(gains: Floats, losses: Floats, wrong: float) -> RadSolution:
    plain = rad_distribution(gains, wrong)
    reason = f"losses left out: {wrong:,g} wrong labels cost more than any choice can gain"
    value = guaranteed_gain(gains, plain.probabilities, wrong, losses)
    return RadSolution(plain.probabilities, value, plain.support, f"{reason}; {plain.fallback}".rstrip("; "))


def _losses(gains: Floats, losses: npt.ArrayLike | None) -> Floats:
    array = np.asarray(np.median(gains) if losses is None else losses, np.float64)
    array = np.full(len(gains), array) if array.ndim == 0 else array
    require_same_length(gains=gains, losses=array)
    require_each("losses", array, np.isfinite(array) & (array >= 0), "finite and at least 0")
    return array
