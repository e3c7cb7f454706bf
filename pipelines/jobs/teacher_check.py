"""The check of a teacher by its validation answers: at chance, or with its classes in another order, it ends the run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from distilbeam.selection.trust.class_order import ClassOrder
from distilbeam.student.data.class_labels import is_numeral

_SHOWN = 3  # outputs that stand for another class
_LISTED = 30  # classes that are listed in another order
_WAY_OUT = "data.check_classes = false goes on all the same"


def require_order(
    answers: npt.NDArray[np.float32],
    truth: npt.NDArray[np.int64],
    classes: Sequence[str],
    rng: np.random.Generator,
) -> None:
    """Refuse a teacher whose labels would be wrong; see `selection.class_order`.

    Args:
      answers: float [n, C] log-probabilities for the validation set, NaN in rows without an answer.
      truth: int64 [n], the true classes.
      classes: their names, in order.
      rng: halves the rows.

    Raises:
      ValueError: a permutation of its outputs fits far better, or it is at chance.
    """
    answered = ~np.isnan(answers).any(axis=1)
    found = ClassOrder.judge(answers[answered].argmax(axis=1), truth[answered], len(classes), rng)
    if found.order is not None:
        raise ValueError(_reordered(found, found.order, classes))
    if found.at_chance:
        raise ValueError(
            f"the teacher is at chance: of its {found.examples:,} answers for the validation set {found.accuracy:.1%} are right, "
            f"{found.chance:.1%} would be without knowledge; look at data.classes, which must be in the order of its outputs, "
            f"data.label and teacher.input; {_WAY_OUT}"
        )


def _reordered(found: ClassOrder, order: npt.NDArray[np.int64], classes: Sequence[str]) -> str:
    moved = np.flatnonzero(order != np.arange(len(classes)))
    pairs = [
        f"where it answers {classes[output]!r} the truth is {classes[order[output]]!r}" for output in moved[:_SHOWN]
    ]
    more = f" and so on, {len(moved):,} of {len(classes):,} classes" if len(moved) > _SHOWN else ""
    listed = f" = {[classes[c] for c in order]}" if len(classes) <= _LISTED else ""
    if any(is_numeral(name) for name in classes):
        listed += ' and data.integers = "names"'
    return (
        f"the teacher's outputs are in another order than the classes: of its {found.examples:,} answers for the validation set "
        f"{found.accuracy:.1%} are right, {found.reordered_accuracy:.1%} would be in another order: {', '.join(pairs)}{more}; "
        f"give data.classes in the order of its outputs{listed}, with another run.directory; {_WAY_OUT}"
    )
