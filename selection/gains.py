"""Gains: how much the student would learn from an example's label, computed from the student's logits.

With the student's probabilities f_1 >= f_2 >= ... of an example,

    margin            1 - (f_1 - f_2)                     in [0, 1]
    entropy           - sum f log f                       in [0, log C] nats
    least confidence  1 - f_1                             in [0, 1 - 1/C]

A gain of 0 takes an example out of the game for good, so none of them may reach 0 by rounding: with a confident student
f_1 rounds to 1, and 1 - f_1 to 0, while the remaining probabilities still tell the examples apart. Everything is therefore
computed in float64 from the probabilities other than the largest, which are small and keep their relative precision.
Cost: one softmax of each row.

The gain of Robust Active Distillation is the margin (Baykal et al., arXiv 2210.01213; its formula is recalled, not quoted).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import Floats, as_scores

Gain = Callable[[npt.ArrayLike], Floats]


def margin_gain(logits: npt.ArrayLike) -> Floats:
    """Compute one minus the difference of the two largest probabilities.

    Args:
      logits: float [n, C], the student's logits (log-probabilities will do); -inf for an impossible class.

    Returns:
      float64 [n] in [0, 1], as (sum of the other probabilities) + f_2.

    Raises:
      ValueError: logits are not [n, C] with C >= 2, or hold NaN or +inf.

    Example:
      >>> margin_gain([[0.0, 0.0], [40.0, 0.0]])
      array([1.00000000e+00, 8.49670851e-18])
    """
    odds, total = _odds_against_top(as_scores("logits", logits))
    return np.asarray((odds.sum(axis=1) + odds.max(axis=1)) / total)


def entropy_gain(logits: npt.ArrayLike) -> Floats:
    """Compute the entropy of the probabilities.

    Args:
      logits: float [n, C], the student's logits; -inf for an impossible class.

    Returns:
      float64 [n] in [0, log C], in nats.

    Raises:
      ValueError: logits are not [n, C] with C >= 2, or hold NaN or +inf.

    Example:
      >>> entropy_gain([[0.0, 0.0]])
      array([0.69314718])
    """
    odds, total = _odds_against_top(as_scores("logits", logits))
    # With f = odds / total and log f_1 = -log total: -sum f log f = log total - sum odds log odds / total.
    spread = np.where(odds > 0, odds * np.log(np.where(odds > 0, odds, 1.0)), 0.0).sum(axis=1)
    return np.asarray(np.log1p(odds.sum(axis=1)) - spread / total)


def least_confidence_gain(logits: npt.ArrayLike) -> Floats:
    """Compute one minus the largest probability.

    Args:
      logits: float [n, C], the student's logits; -inf for an impossible class.

    Returns:
      float64 [n] in [0, 1 - 1/C].

    Raises:
      ValueError: logits are not [n, C] with C >= 2, or hold NaN or +inf.

    Example:
      >>> least_confidence_gain([[0.0, 0.0]])
      array([0.5])
    """
    odds, total = _odds_against_top(as_scores("logits", logits))
    return np.asarray(odds.sum(axis=1) / total)


# every gain there is; a new one is a line here, and a run, the selectors and the benchmarks know it
GAINS: dict[str, Gain] = {
    "margin": margin_gain,
    "entropy": entropy_gain,
    "least_confidence": least_confidence_gain,
}


def gain_named(name: str) -> Gain:
    """Return a gain by its name, in which `-` and `_` are the same.

    Raises:
      ValueError: there is none of that name.
    """
    found = GAINS.get(name.replace("-", "_"))
    if found is None:
        raise ValueError(f"gain must be one of {', '.join(GAINS)}, got {name!r}")
    return found


def _odds_against_top(logits: Floats) -> tuple[Floats, Floats]:
    """Give f_j / f_1 of every class but the top one (whose entry is 0) and their sum with 1, which is 1 / f_1."""
    rows, top = np.arange(len(logits)), logits.argmax(axis=1)
    odds = np.exp(logits - logits[rows, top][:, None])
    odds[rows, top] = 0.0
    return odds, 1.0 + odds.sum(axis=1)
