"""The order of a teacher's classes, tested on a validation set before labels are bought.

Two questions about n answers a and truths t:

1. Is the teacher at chance? Answers that know nothing of the truth are right in a share q = sum_c P(t = c) P(a = c) of the rows.
   It is at chance when the number of right answers is not significantly above Binomial(n, q), at 5 %, and significantly below
   Binomial(n, q + (1 - q) / 5), at 1 %, that of a teacher which knows a fifth of what there is to know: where rows are too few to
   tell the two apart nothing is said.
2. Does a permutation of its outputs fit far better? The best one is an assignment on the confusion matrix, and the best of C!
   fits any noise; so it is found on one half of the rows and judged on the other, both ways. It fits far better when the rows
   that only it has right outnumber those that only the order as it is has right by 4 to 1, significantly (sign test, 0.1 %),
   and when of the classes it moves at least three quarters are met better by it: two outputs that were exchanged both are, while
   a teacher that takes one class for another is not.

A teacher that is weak but honest passes: one that is right on 26 % of the rows of ten classes is stopped in 2 of 100 validation sets
of 60 rows, in 1 of 100 of 100 rows, in none of 300 rows. Cost: three assignments, O(C^3) at worst, on the classes that were met.

References:
  Cohen, A coefficient of agreement for nominal scales, 1960 (the chance level q); McNemar, 1947 (the sign test);
  Kuhn, The Hungarian method for the assignment problem, 1955.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BETTER_LEVEL = 0.05  # of the test against chance
USELESS_LEVEL = 0.01  # of the test against a useful teacher
USEFUL = 0.2  # of what there is to know above chance
ORDER_LEVEL = 0.001  # of the sign test
OUTNUMBERED = 4
CONFIRMED = 0.75  # of the classes that a permutation moves

_Labels = npt.NDArray[np.integer]


@dataclass(frozen=True)
class ClassOrder:
    """What a validation set says about the order of a teacher's outputs.

    Attributes:
      examples: n, the labelled examples that were looked at.
      accuracy: share of right answers.
      chance: q, the share that answers without knowledge would have right.
      at_chance: whether the teacher is at chance.
      order: int64 [C], the class that each output stands for under the permutation that fits far better; None if none does.
      reordered_accuracy: share of right answers under it, on the rows that it was not found on.
    """

    examples: int
    accuracy: float
    chance: float
    at_chance: bool
    order: npt.NDArray[np.int64] | None
    reordered_accuracy: float

    @classmethod
    def judge(cls, answers: _Labels, truth: _Labels, classes: int, rng: np.random.Generator) -> ClassOrder:
        """Judge a teacher's answers.

        Args:
          answers: int [n], the teacher's most probable classes.
          truth: int [n], the true ones.
          classes: C.
          rng: halves the rows.
        """
        answers, truth = np.asarray(answers, np.int64), np.asarray(truth, np.int64)
        n = len(truth)
        shares = [np.bincount(values, minlength=classes) / max(1, n) for values in (answers, truth)]
        chance = float(shares[0] @ shares[1])
        right = int((answers == truth).sum())
        order, reordered = _better_order(answers, truth, classes, rng)
        return cls(n, right / max(1, n), chance, _at_chance(right, n, chance), order, reordered)


def _at_chance(right: int, n: int, chance: float) -> bool:
    from scipy.stats import binom  # half a second, which every start would pay

    if n == 0 or chance >= 1:
        return False
    no_better = binom.sf(right - 1, n, chance) > BETTER_LEVEL
    worse_than_useful = binom.cdf(right, n, chance + (1 - chance) * USEFUL) < USELESS_LEVEL
    return bool(no_better and worse_than_useful)


def _better_order(
    answers: _Labels, truth: _Labels, classes: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64] | None, float]:
    """Find an order that fits far better, and its share of right answers on rows that it was not found on."""
    from scipy.stats import binom

    order = _assignment(answers, truth, classes)
    if (order == np.arange(classes)).all():
        return None, 0.0
    half = rng.permutation(len(truth)) % 2 == 0
    meant = np.where(half, *(_assignment(answers[~part], truth[~part], classes)[answers] for part in (half, ~half)))
    ours, as_it_is = meant == truth, answers == truth
    only_ours, only_as_it_is = int((ours & ~as_it_is).sum()), int((as_it_is & ~ours).sum())
    if only_ours < OUTNUMBERED * only_as_it_is:
        return None, 0.0
    if binom.sf(only_ours - 1, only_ours + only_as_it_is, 0.5) > ORDER_LEVEL or not _confirmed(
        order, ours, as_it_is, truth
    ):
        return None, 0.0
    return order, float(ours.mean())


def _confirmed(
    order: npt.NDArray[np.int64], ours: npt.NDArray[np.bool_], as_it_is: npt.NDArray[np.bool_], truth: _Labels
) -> bool:
    """Tell whether most of the moved classes that have rows are met better, not some at the cost of others."""
    gains = np.bincount(truth, ours.astype(float) - as_it_is, minlength=len(order))
    moved = (order != np.arange(len(order))) & (np.bincount(truth, minlength=len(order)) > 0)
    return bool(moved.any() and (gains[moved] > 0).mean() >= CONFIRMED)


def _assignment(answers: _Labels, truth: _Labels, classes: int) -> npt.NDArray[np.int64]:
    """Give each output the class that makes most rows right, and its own where that is one row less."""
    from scipy.optimize import linear_sum_assignment

    met = np.flatnonzero(np.bincount(answers, minlength=classes) + np.bincount(truth, minlength=classes))
    place = np.zeros(classes, np.int64)
    place[met] = np.arange(len(met))
    confusion = np.zeros((len(met), len(met)))
    np.add.at(confusion, (place[answers], place[truth]), 1)
    order = np.arange(classes)
    outputs, meant = linear_sum_assignment(confusion + np.eye(len(met)), maximize=True)
    order[met[outputs]] = met[meant]
    return order
