"""Two models on the same examples: McNemar's exact test of whether one of them is better.

Examples that both have right, or both wrong, say nothing about the difference; of the others each is as likely for either
model where they are equally good, which makes their number a binomial one.

References:
  McNemar, Note on the sampling error of the difference between correlated proportions or percentages, 1947.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Paired(NamedTuple):
    """What changed from one model to another on the same examples.

    Attributes:
      before, after: shares of right answers.
      lost: examples that the first has right and the second wrong.
      won: the other way round.
      p: probability of at least so many lost of those that changed, were both models equally good; in (0, 1].
    """

    before: float
    after: float
    lost: int
    won: int
    p: float


def paired(before: npt.ArrayLike, after: npt.ArrayLike) -> Paired:
    """Compare two models on the same examples.

    Args:
      before: bool [n], where the first model is right.
      after: bool [n], where the second is.

    Raises:
      ValueError: they have different lengths, or no example.

    Example:
      >>> paired([True] * 5 + [False], [False] * 5 + [False]).p  # 1 / 2^5
      0.03125
    """
    first, second = np.asarray(before, bool), np.asarray(after, bool)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"before and after must be as long, and not empty, got {first.size} and {second.size}")
    lost, won = int((first & ~second).sum()), int((second & ~first).sum())
    changed = lost + won
    p = sum(math.comb(changed, k) for k in range(lost, changed + 1)) / 2**changed
    return Paired(float(first.mean()), float(second.mean()), lost, won, p)
