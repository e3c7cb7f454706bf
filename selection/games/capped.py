"""The game of Robust Active Distillation when something is known about where the teacher errs.

A wrong label pays -l_i instead of g_i, and at point i the adversary's share of wrongness z_i is at most c_i, the largest
error rate that is believable there; it has k in all:

    V = max_{0<=q<=1, sum q = b}  min_{0<=z<=c, sum z <= k}  sum_i q_i (g_i - z_i w_i),        w_i = g_i + l_i

c = 1 is the game of `distilbeam.selection.games.rad`, for a batch and with losses. k >= sum c lets every cap be used up, so that
the optimum is greedy by g - c w, which for l = 0 is the expected gain of a right label, g (1 - c). k = 0 is greedy by g.
Between them an error rate is only as harmful as the adversary's k allows.

With the multiplier lam of sum z <= k, the inner minimum is linear and

    V = max_lam h(lam),   h(lam) = -k lam + max_q sum_i q_i g_i - c_i max(0, q_i w_i - lam),

whose inner maximum is separable: point i offers a first part of length min(1, lam / w_i) at slope g_i, and the rest at
slope g_i - c_i w_i. The parts are taken by slope until b is spent. The slopes do not depend on lam, so they are sorted once;
h is concave and its slope has the sign that a bisection needs. Any q that attains h(lam) guarantees at least h(lam) in
the game, hence what is left of the bisection's interval costs no more than k times its width.
Cost: one sort of 2n slopes, then O(n) for each of about 60 steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import SupportsFloat, SupportsIndex

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import Floats, as_budget, as_gains, as_wrong, require_each, require_same_length
from distilbeam.selection.games.rad import RadSolution

_STEPS = 80  # halvings: the interval ends at the spacing of float64


def capped_marginals(
    gains: npt.ArrayLike,
    caps: npt.ArrayLike,
    wrong: SupportsFloat,
    budget: SupportsIndex,
    losses: npt.ArrayLike = 0.0,
) -> RadSolution:
    """Find the probabilities of buying each point that guarantee most when its error rate is at most its cap.

    Args:
      gains: float [n], >= 0.
      caps: float [n] or one number, in [0, 1]: the largest error rate believed at each point.
      wrong: k >= 0, the number of wrong labels in the pool; real. At least sum(caps) means the caps alone bind.
      budget: b, whole number of labels to buy, between 1 and n.
      losses: float [n] or one number, >= 0: what a wrong label costs.

    Returns:
      The probabilities (sum b, each in [0, 1]), the guaranteed gain (negative if losses outweigh it) and the number of
      points with a positive one. Points that are alike in gain, cap and loss get equal probabilities.

    Raises:
      ValueError: an array is of another length, a gain or loss is negative or not finite, a cap is outside [0, 1], k is
        negative, or the budget is not a whole number between 1 and n.

    Example:
      >>> capped_marginals([4.0, 3.0, 2.0, 1.0], caps=1.0, wrong=1, budget=3).probabilities.round(6)
      array([0.75, 1.  , 1.  , 0.25])
      >>> capped_marginals([4.0, 3.0, 2.0, 1.0], caps=[0.9, 0.1, 0.1, 0.1], wrong=9, budget=2).probabilities
      array([0., 1., 1., 0.])

    References:
      arXiv 2210.01213 for the game; the caps and the solution are this project's, tested against linear programs.
    """
    array, wrong = np.asarray(as_gains(gains), np.float64), as_wrong(wrong)
    budget = as_budget(budget, len(array))
    game = _Game(array, _spread("caps", caps, array, 1.0), array + _spread("losses", losses, array, np.inf), budget)
    low, high = 0.0, float(game.stakes.max())
    if game.slope(high) >= wrong:
        low = high
    for _ in range(_STEPS):
        if not low < (middle := 0.5 * (low + high)) < high:
            break
        low, high = (middle, high) if game.slope(middle) >= wrong else (low, middle)
    level = max(low, high, key=lambda lam: game.worth(lam) - wrong * lam)
    q = game.fill(level)[0]
    return RadSolution(q, game.worth(level) - wrong * level, int(np.count_nonzero(q)))


@dataclass(frozen=True)
class _Game:
    """Gains, caps and stakes w = g + l, [n], and the budget."""

    gains: Floats
    caps: Floats
    stakes: Floats
    budget: int

    @cached_property
    def slopes(self) -> Floats:
        """Of the first parts, then of the second ones, [2n]."""
        return np.concatenate([self.gains, self.gains - self.caps * self.stakes])

    @cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """The parts by falling slope."""
        return np.argsort(-self.slopes, kind="stable")

    def fill(self, lam: float) -> tuple[Floats, float]:
        """Spend the budget by slope; parts of the last slope are taken in equal shares. Gives q and that slope."""
        first = np.minimum(1.0, np.divide(lam, self.stakes, out=np.ones(len(self.gains)), where=self.stakes > lam))
        lengths = np.concatenate([first, 1.0 - first])
        taken = np.cumsum(lengths[self.order])
        last = self.slopes[self.order[min(int(np.searchsorted(taken, self.budget)), len(taken) - 1)]]
        share = np.where(self.slopes > last, 1.0, 0.0)
        tied = self.slopes == last
        room = float(lengths[tied].sum())
        if room > 0:
            share[tied] = np.clip((self.budget - float((share * lengths).sum())) / room, 0.0, 1.0)
        amounts = (share * lengths).reshape(2, -1)
        return np.asarray(np.minimum(amounts.sum(axis=0), 1.0)), float(last)

    def slope(self, lam: float) -> float:
        """Give the right derivative of h at lam, with k added: how much a longer first part is worth."""
        last = self.fill(lam)[1]
        longer = (self.stakes > lam) & (self.gains > last)
        worth = np.minimum(self.caps[longer], (self.gains[longer] - last) / self.stakes[longer])
        return float(worth.sum())

    def worth(self, lam: float) -> float:
        """Give h(lam) + k lam."""
        q = self.fill(lam)[0]
        return float((q * self.gains - self.caps * np.maximum(0.0, q * self.stakes - lam)).sum())


def _spread(field: str, values: npt.ArrayLike, gains: Floats, most: float) -> Floats:
    array = np.asarray(values, np.float64)
    array = np.full(len(gains), array) if array.ndim == 0 else array
    require_same_length(gains=gains, **{field: array})
    rule = "between 0 and 1" if most == 1 else "finite and at least 0"
    require_each(field, array, np.isfinite(array) & (array >= 0) & (array <= most), rule)
    return array
