"""The answers of a teacher: what its numbers are, and the logits that they become.

    logits              x
    log-probabilities   x; exp(x) sums to 1 in every row
    probabilities       log x, in float64, -inf for 0; x is in [0, 1] and sums to 1 in every row

Probabilities that are taken for logits are softened without an error (of three classes, 1, 0, 0 becomes .576, .212,
.212), so that rows which look like probabilities are refused where logits are said to come, and the other way round.
Rows of logits lie in [0, 1] and sum to 1 by chance: the first row that does not settles the question, and it takes
several that do, or one that does to all its digits.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from distilbeam.teacher.protocol import TeacherMisfit

AnswerKind = Literal["logits", "log-probabilities", "probabilities"]

_TOLERANCE = 1e-2  # of a row's sum: half precision, bfloat16 and 8-bit models round each probability
_EXACT = 4 * np.finfo(np.float32).eps  # of a sum of probabilities in single precision, for each class
_ENOUGH_ROWS = 4


class AnswerError(ValueError):
    """A row of numbers that are not of the kind that the teacher is said to answer with."""


class AnswerForm:
    """Turns what a model answers into logits, and notices a model that answers something else.

    Args:
      kind: what the numbers are, the setting `teacher.answers`.
    """

    def __init__(self, kind: AnswerKind) -> None:
        self.kind = kind
        self._settled = False  # rows of the kind that is said have been seen
        self._contrary = 0  # rows of another kind, before one of this kind

    def __call__(self, answers: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """Return the logits.

        Args:
          answers: floating [n, C]; anything of another shape or type is passed on for the caller to refuse.

        Returns:
          float32 [n, C].

        Raises:
          TeacherMisfit: the rows are not of the kind that is said, and none was.
          AnswerError: a row is not of that kind, though others were.
        """
        if answers.ndim == 2 and answers.shape[1] > 1 and answers.dtype.kind == "f":
            if self.kind == "logits":
                if not self._settled:
                    self._refuse_probabilities(answers)
            else:
                self._require_distributions(answers)
        if self.kind == "probabilities" and answers.dtype.kind == "f":
            with np.errstate(divide="ignore", invalid="ignore"):
                answers = np.log(np.maximum(answers.astype(np.float64), 0))  # a NaN stays one
        if answers.dtype.kind not in "fiub":
            return answers
        with np.errstate(over="ignore"):
            return answers.astype(np.float32, copy=False)

    def _refuse_probabilities(self, answers: npt.NDArray[np.floating]) -> None:
        known = answers[~np.isnan(answers).any(axis=1)].astype(np.float64)
        if not len(known):
            return
        off = np.abs(known.sum(axis=1) - 1)
        alike = (known >= 0).all(axis=1) & (known <= 1 + _TOLERANCE).all(axis=1) & (off <= _TOLERANCE)
        if not alike.all():
            self._settled = True
            return
        self._contrary += len(known)
        fractions = ((known > 0) & (known < 1)).any(axis=1)
        if self._contrary >= _ENOUGH_ROWS or (fractions & (off <= _EXACT * known.shape[1])).all():
            raise TeacherMisfit(
                "teacher.answers is 'logits', but the teacher's rows lie in [0, 1] and sum to 1, such as "
                f"{_shown(known[0])}: probabilities taken for logits would be softened; say teacher.answers = "
                "'probabilities', or choose the output of the model that holds its logits"
            )

    def _require_distributions(self, answers: npt.NDArray[np.floating]) -> None:
        wide = answers.astype(np.float64)
        known = ~np.isnan(wide).any(axis=1)
        with np.errstate(over="ignore"):
            masses = wide if self.kind == "probabilities" else np.exp(wide)
        least = -_TOLERANCE if self.kind == "probabilities" else -np.inf
        good = (wide >= least).all(axis=1) & (masses <= 1 + _TOLERANCE).all(axis=1)
        with np.errstate(invalid="ignore"):
            good &= np.abs(masses.sum(axis=1) - 1) <= _TOLERANCE
        self._settled = self._settled or bool(good.any())
        bad = np.flatnonzero(known & ~good)
        if not bad.size:
            return
        row = wide[bad[0]]
        what = "exponentials must sum" if self.kind == "log-probabilities" else "rows must lie in [0, 1] and sum"
        total = masses[bad[0]].sum()
        sentence = (
            f"teacher.answers is '{self.kind}', whose {what} to 1, got {_shown(row)} with the sum {total:.6g}; say what the "
            "numbers are: 'logits', 'log-probabilities' or 'probabilities'"
        )
        self._contrary += len(bad)
        if not self._settled and self._contrary >= _ENOUGH_ROWS:
            raise TeacherMisfit(sentence)
        raise AnswerError(sentence)


def labels(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Tell which rows of logits are labels: numbers below +inf, -inf for classes that are impossible, not for all.

    Args:
      logits: float [n, C], what a model answered, made logits of.

    Returns:
      bool [n].
    """
    largest = logits.max(axis=1, initial=-np.inf)  # NaN where a number is
    good: npt.NDArray[np.bool_] = np.isfinite(largest)
    return good


def _shown(row: npt.NDArray[np.float64]) -> str:
    numbers = [f"{value:.4g}" for value in row[:4]]
    return f"[{', '.join([*numbers, '...'] if len(row) > 4 else numbers)}]"
