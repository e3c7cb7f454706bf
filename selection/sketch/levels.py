"""Solve the capped game on a pool that is described by its distinct levels of gain.

A pool is a list of levels x_0 > x_1 > ... > 0 with c_j points each: the distinct values of the gains (exact), or the bins
of a histogram, each represented by its harmonic mean (a sketch). The game for a budget of b labels, of which an adversary
makes k wrong (Robust Active Distillation, arXiv 2210.01213, with the bound q <= 1 of sampling without replacement), is

    V_b = max_{0<=q<=1, sum q = b}  min_{|S|=k}  sum_{i not in S} q_i g_i
        = max_{L>=0} [ max_q sum_i min(q_i g_i, L) ] - k L.

For a fixed L the inner problem is greedy by gain: q_i = min(1, L/g_i) down the list until b is used up, at a gain v. The
outer function is concave with right derivative D(L) = sum over g_i > max(L, v) of (1 - v/g_i) - k, so that

* not capped: v = V solves sum max(0, 1 - V/g) = k and L = b / sum_{g > V} 1/g;
* capped (that L exceeds the smallest gain above V): the largest level x_j with D(x_j) <= 0 is found by bisection, and just
  below it D vanishes where the points above v* = (#{g > L} - k) / sum_{g > L} 1/g are exactly used up.

The optimum spends L/g on points above L, 1 between v and L, one equal part on each point at v, and nothing below. Sums are
of ratios of gains, taken only over points above the numerator, so no range of gains can overflow.
Cost: O(log levels) sums over the levels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import Floats


@dataclass(frozen=True)
class Levels:
    """A pool by its levels of positive gain, from the largest to the smallest.

    Attributes:
      values: float64 [m], strictly decreasing; the harmonic mean of the gains of a level.
      counts: int64 [m], points of each level.
      totals: float64 [m], sum of the gains of each level.
      zeros: points whose gain is 0.
    """

    values: Floats
    counts: npt.NDArray[np.int64]
    totals: Floats
    zeros: int

    @property
    def positive(self) -> int:
        """Number of points with a positive gain."""
        return int(self.counts.sum())

    def ratio_sum(self, numerator: float, stop: int) -> float:
        """Sum numerator/g over the points of the first `stop` levels."""
        return float((self.counts[:stop] * (numerator / self.values[:stop])).sum())


@dataclass(frozen=True)
class Spending:
    """An optimal q as a function of the level.

    Attributes:
      level: L; points of levels [0, shared) get level / gain.
      shared: end of the levels that share equally.
      full: end of the levels [shared, full) that get probability 1.
      partial: probability of the points of level number `full`.
      zero: probability of the points without gain.
      value: the guaranteed gain V_b.
      critical: the gains at which the solution changes its form (level and cut). A level of the pool that stands for
        several gains may be taken whole if none of these falls inside it.
    """

    level: float
    shared: int
    full: int
    partial: float
    zero: float
    value: float
    critical: tuple[float, ...]


def solve_levels(pool: Levels, wrong: float, budget: int) -> Spending | None:
    """Solve the capped game.

    Args:
      pool: the pool's levels.
      wrong: k >= 0, real.
      budget: b, between 1 and the number of points.

    Returns:
      An optimal spending; None if k wrong labels can cover every positive gain, so that nothing is guaranteed.
    """
    if wrong >= pool.positive:
        return None
    support = support_end(pool.values, pool.counts, pool.values, wrong)
    least = pool.values[support - 1]
    ratios = pool.ratio_sum(least, support)
    if budget <= ratios:
        points = float(pool.counts[:support].sum())
        level, cut = float(least * (budget / ratios)), float(least * ((points - wrong) / ratios))
        return Spending(level, support, support, 0.0, 0.0, level * (points - wrong), (cut,))
    return _spend_capped(pool, wrong, budget, support)


def support_end(gains: Floats, counts: npt.NDArray[np.int64], costs: Floats, wrong: float) -> int:
    """Find how many leading points carry the uncapped solution.

    The smallest I for which sum_{j<=I} g_j/w_j - k >= sum_{j<=I} g_{I+1}/w_j, which is g_{I+1} <= F_I; every term lies in
    [0, 1].

    Args:
      gains: float64 [m], non-increasing.
      counts: points of each entry.
      costs: float64 [m], w >= g: what a wrong label takes away (the gain itself, and the loss if there is one).
      wrong: k.

    Returns:
      I, at least the number of points that share the largest gain; m if no smaller one fits.
    """

    def is_enough(end: int) -> bool:
        # Without the difference g_j - g_{I+1}, in which a much smaller gain would vanish.
        ahead = float((counts[:end] * (gains[:end] / costs[:end])).sum()) - wrong
        if ahead == 0 and gains[end] > 0:
            return False  # the right side is positive even if it underflows
        return ahead >= float((counts[:end] * (gains[end] / costs[:end])).sum())

    first = int(np.searchsorted(-gains, -gains[0], side="right"))
    return _first_true(is_enough, first, len(gains))


def _spend_capped(pool: Levels, wrong: float, budget: int, support: int) -> Spending:
    ends = np.concatenate([[0], np.cumsum(pool.counts)])
    least = pool.values[support - 1]
    plain = budget / pool.ratio_sum(least, support)  # the uncapped level, in units of `least`

    def is_past(number: int) -> bool:
        """Tell whether D <= 0 just above level `number`."""
        level = pool.values[number]
        left = budget - pool.ratio_sum(level, number)
        if left <= 0:  # used up above the level itself: v passes V exactly when L passes the uncapped level
            return bool(level >= plain * least)
        stop = int(np.searchsorted(ends, ends[number] + left, side="right")) - 1
        v_ratios = pool.ratio_sum(pool.values[stop], number) if stop < len(pool.values) else 0.0
        return bool(ends[number] - wrong <= v_ratios)

    last = _first_true(lambda number: not is_past(number), 1, len(pool.values)) - 1
    shared = last + 1
    unit = pool.values[last]
    ratios = pool.ratio_sum(unit, shared)
    cut = unit * ((ends[shared] - wrong) / ratios)
    full = max(int(np.searchsorted(-pool.values, -cut, side="right")), shared)
    below = unit * ((budget - (ends[full] - ends[shared])) / ratios)
    floor = pool.values[shared] if shared < len(pool.values) else 0.0
    if below >= unit:
        return _fill(pool, ends, wrong, budget, unit, last)
    if below < floor:
        return _fill(pool, ends, wrong, budget, floor, shared)
    value = below * (ends[shared] - wrong) + pool.totals[shared:full].sum()
    return Spending(float(below), shared, full, 0.0, 0.0, float(value), (float(below), float(cut)))


def _fill(pool: Levels, ends: npt.NDArray[np.int64], wrong: float, budget: int, level: float, shared: int) -> Spending:
    """Spend level/gain on the first `shared` levels and the rest of the budget on the following ones in turn."""
    left = budget - pool.ratio_sum(level, shared)
    full = int(np.searchsorted(ends, ends[shared] + left, side="right")) - 1
    value = level * (ends[shared] - wrong) + pool.totals[shared:full].sum()
    if full == len(pool.values):
        return _top_up(pool, ends, budget, float(value), float(level))
    partial = float((left - (ends[full] - ends[shared])) / pool.counts[full])
    value += partial * pool.totals[full]
    critical = (float(level), float(pool.values[full]))
    return Spending(float(level), shared, full, partial, 0.0, float(value), critical)


def _top_up(pool: Levels, ends: npt.NDArray[np.int64], budget: int, value: float, game_level: float) -> Spending:
    """Spend what the game leaves over by raising the level, which the guarantee allows, and then on points without gain."""
    count, levels = int(ends[-1]), len(pool.values)
    if budget >= count:
        zero = (budget - count) / pool.zeros if pool.zeros else 0.0
        return Spending(float(pool.values[0]), 0, levels, 0.0, zero, value, (game_level,))

    def is_short(number: int) -> bool:
        return bool(pool.ratio_sum(pool.values[number], number) + count - ends[number] < budget)

    shared = _first_true(is_short, 1, levels)
    unit = pool.values[shared - 1]
    level = unit * ((budget - (count - ends[shared])) / pool.ratio_sum(unit, shared))
    return Spending(float(level), shared, levels, 0.0, 0.0, value, (game_level, float(level)))


def _first_true(is_true: Callable[[int], bool], start: int, stop: int) -> int:
    """Find the first integer in [start, stop) for which a monotone predicate holds, else stop."""
    while start < stop:
        middle = (start + stop) // 2
        start, stop = (start, middle) if is_true(middle) else (middle + 1, stop)
    return start
