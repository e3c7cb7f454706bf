"""The accuracy of a teacher, as Student-Label Mixing estimates it, and its error count for Robust Active Distillation.

On a validation set that the teacher was not trained on, with d(x) the teacher's margin (difference of its two largest
probabilities):

    a(x)  isotonic regression of "the teacher is right" on d(x), not below `floor`
    m(x)  2 for two classes, else the smallest m >= 2 for which the isotonic regression of "the truth is among the teacher's
          top m" on d(x) reaches `coverage`
    k     pool size times (1 - validation accuracy), with its standard error

Isotonic regression takes nothing for granted but that a larger margin is no worse; between the margins seen it interpolates
linearly, beyond them it is constant. The lower bound on a(x) keeps the pull towards the teacher's label of the right sign.
Cost: one sort of the validation margins for each m that is tried.

References:
  Kontonis, Iliopoulos, Trinh, Baykal, Menghani, Vee: Student-Label Mixing for Distillation with Unlabeled Examples,
  NeurIPS 2023, arXiv 2302.03806 (isotonic regression of the accuracy and its lower bound; the rule for m is recalled).
  Baykal et al., arXiv 2210.01213 (the number of wrong labels, estimated on the validation set).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import Floats, as_labels, as_log_probabilities
from distilbeam.selection.margins import ranks_of, top_margins
from distilbeam.selection.trust.calibration import Calibration as Calibration
from distilbeam.selection.trust.calibration import expected_calibration_error as expected_calibration_error
from distilbeam.selection.trust.calibration import fit_temperature as fit_temperature
from distilbeam.selection.trust.ties import merge_ties

_FEW_LABELS = 100


class TeacherErrors(NamedTuple):
    """How many labels of a pool the teacher gets wrong.

    Attributes:
      wrong: k, the expected number; real.
      standard_error: of k, from the size of the validation set.
      rate: the error rate on the validation set.
      note: what the estimate fell back to, empty if to nothing.
    """

    wrong: float
    standard_error: float
    rate: float
    note: str


@dataclass(frozen=True)
class TeacherNoise:
    """The teacher's accuracy and candidate classes as functions of its margin.

    Attributes:
      margins, accuracies: the knots of the isotonic fit, ascending; not yet clipped at the floor.
      floor: lower bound of the accuracy.
      coverage: how often the truth is to be among the candidates.
      candidate_margins: for m = 2, 3, ... the margin from which m classes reach the coverage; descending.
      num_classes: C, the number of classes.
      notes: what the fit fell back to, one sentence each.
    """

    margins: tuple[float, ...]
    accuracies: tuple[float, ...]
    floor: float
    coverage: float
    candidate_margins: tuple[float, ...]
    num_classes: int
    notes: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls, teacher_logprobs: npt.ArrayLike, labels: npt.ArrayLike, floor: float = 0.5, coverage: float = 0.9
    ) -> TeacherNoise:
        """Fit on a validation set that the teacher has not seen.

        Args:
          teacher_logprobs: float [n, C], the teacher's log-probabilities; -inf for impossible classes, so that hard labels
            are soft labels with one finite entry.
          labels: int [n], the true classes.
          floor: lower bound of the accuracy, in [0, 1]. Above 1/2 for two classes, or for the "plain" mixture, and above 1/m
            for the "normalised" one the student is pulled the right way.
          coverage: in (0, 1].

        Returns:
          The fit. `notes` says when the teacher is perfect or useless, labels are few, or a class was never seen.

        Raises:
          ValueError: shapes differ, probabilities do not sum to one, a label is not a class, no labels, or floor or coverage
            is out of range.

        Example:
          >>> noise = TeacherNoise.fit(np.log([[0.9, 0.1], [0.6, 0.4]]), [0, 1])
          >>> noise.accuracy(np.log([[0.9, 0.1], [0.6, 0.4]]))
          array([1. , 0.5])
        """
        logprobs, truth = _validation(teacher_logprobs, labels)
        _check_share("floor", floor)
        _check_share("coverage", coverage)
        if coverage == 0:
            raise ValueError("coverage must be above 0, got 0")
        margins, ranks = top_margins(logprobs), ranks_of(logprobs, truth)
        knots, accuracies = _isotonic(margins, ranks == 0)
        starts = _candidate_margins(margins, ranks, coverage, logprobs.shape[1])
        notes = _notes(ranks == 0, accuracies, floor, truth, logprobs.shape[1])
        return cls(_numbers(knots), _numbers(accuracies), floor, coverage, starts, logprobs.shape[1], notes)

    def accuracy(self, teacher_logprobs: npt.ArrayLike) -> Floats:
        """Estimate a(x), the probability that the teacher is right.

        Args:
          teacher_logprobs: float [n, C] log-probabilities.

        Returns:
          float64 [n] in [floor, 1].

        Raises:
          ValueError: the number of classes is not that of the fit, or probabilities do not sum to one.
        """
        fitted = np.interp(self._margins(teacher_logprobs), self.margins, self.accuracies)
        return np.maximum(fitted, self.floor)

    def candidates(self, teacher_logprobs: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Estimate m(x), how many of the teacher's top classes hold the truth.

        Args:
          teacher_logprobs: float [n, C] log-probabilities.

        Returns:
          int64 [n] in [2, C].

        Raises:
          ValueError: as for `accuracy`.
        """
        margins = self._margins(teacher_logprobs)
        rising = np.array(self.candidate_margins[::-1])
        short = len(rising) - np.searchsorted(rising, margins, side="right")
        return np.asarray(np.minimum(2 + short, self.num_classes), np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        lists = {name: list(getattr(self, name)) for name in ("margins", "accuracies", "candidate_margins", "notes")}
        return {**lists, "floor": self.floor, "coverage": self.coverage, "num_classes": self.num_classes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TeacherNoise:
        """Rebuild a fit from `to_json`'s data."""
        lists = {name: tuple(data[name]) for name in ("margins", "accuracies", "candidate_margins", "notes")}
        return cls(**lists, floor=data["floor"], coverage=data["coverage"], num_classes=data["num_classes"])

    def _margins(self, teacher_logprobs: npt.ArrayLike) -> Floats:
        logprobs = as_log_probabilities("teacher_logprobs", teacher_logprobs)
        if logprobs.shape[1] != self.num_classes:
            raise ValueError(
                f"teacher_logprobs must have the {self.num_classes:,} classes of the fit, got {logprobs.shape[1]:,}"
            )
        return top_margins(logprobs)


def teacher_errors(teacher_logprobs: npt.ArrayLike, labels: npt.ArrayLike, pool: int) -> TeacherErrors:
    """Estimate how many labels of a pool the teacher gets wrong: the k of the game.

    Args:
      teacher_logprobs: float [n, C], on a validation set that the teacher has not seen.
      labels: int [n], its true classes.
      pool: number of unlabelled examples that are still in the pool; k shrinks with it.

    Returns:
      k = pool (1 - accuracy), its standard error pool sqrt(rate (1 - rate) / n), and the rate. With no error, or nothing
      but errors, that standard error would be 0; it is then that of Jeffreys' prior, and `note` says so.

    Raises:
      ValueError: shapes differ, probabilities do not sum to one, a label is not a class, there are no labels, or the pool
        is negative.

    Example:
      >>> teacher_errors(np.log([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]), [0, 1, 1, 0], pool=1000).wrong
      250.0

    References:
      arXiv 2210.01213 (k from about 1,000 labels; the formula is recalled).
    """
    logprobs, truth = _validation(teacher_logprobs, labels)
    if pool < 0:
        raise ValueError(f"pool must be a number of examples, at least 0, got {pool:,}")
    count, errors = len(truth), int((ranks_of(logprobs, truth) > 0).sum())
    rate, note = errors / count, ""
    spread = math.sqrt(rate * (1 - rate) / count)
    if errors in (0, count):
        spread = math.sqrt((errors + 0.5) * (count - errors + 0.5) / (count + 2)) / (count + 1)
        note = (
            f"the standard error is that of Jeffreys' prior: the teacher is {_always(errors == 0)} on {count:,} labels"
        )
    return TeacherErrors(pool * rate, pool * spread, rate, note)


def _validation(teacher_logprobs: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.int64]]:
    logprobs = as_log_probabilities("teacher_logprobs", teacher_logprobs)
    if not len(logprobs):
        raise ValueError("labels must hold at least one validation example, got none")
    return logprobs, as_labels(labels, *logprobs.shape)


def _isotonic(margins: Floats, outcomes: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Return the knots of the non-decreasing least-squares fit."""
    from sklearn.isotonic import IsotonicRegression  # workers use a fit, they never make one, and start without it

    fit = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(
        merge_ties(margins), outcomes.astype(np.float64)
    )
    return fit.X_thresholds_, fit.y_thresholds_


def _candidate_margins(
    margins: Floats, ranks: npt.NDArray[np.int64], coverage: float, num_classes: int
) -> tuple[float, ...]:
    """Find, for m = 2, 3, ..., the margin from which the fit reaches the coverage; stop where it always does."""
    starts: list[float] = []
    for size in range(2, num_classes):
        start = _first_margin(*_isotonic(margins, ranks < size), coverage)
        if start == -math.inf:
            break
        starts.append(min(start, starts[-1]) if starts else start)
    return tuple(starts)


def _first_margin(knots: Floats, fitted: Floats, coverage: float) -> float:
    """Find the smallest margin at which the interpolated fit reaches the coverage: +inf if nowhere, -inf if everywhere."""
    reached = np.flatnonzero(fitted >= coverage)
    if not reached.size:
        return math.inf
    number = int(reached[0])
    if number == 0:
        return -math.inf
    return float(np.interp(coverage, fitted[number - 1 : number + 1], knots[number - 1 : number + 1]))


def _notes(
    right: npt.NDArray[np.bool_], accuracies: Floats, floor: float, labels: npt.NDArray[np.int64], num_classes: int
) -> tuple[str, ...]:
    count, unseen = len(right), np.setdiff1d(np.arange(num_classes), labels)
    shown = ", ".join(map(str, unseen[:5])) + (", ..." if unseen.size > 5 else "")
    notes = {
        f"the teacher is {_always(True)} on {count:,} validation labels, so its accuracy is taken as 1": right.all(),
        f"the accuracy is the floor of {floor:g} everywhere: no margin makes the teacher better than that": (
            accuracies.max() <= floor
        ),
        f"the fit rests on only {count:,} validation labels": count < _FEW_LABELS,
        f"{unseen.size:,} of {num_classes:,} classes have no validation label ({shown}); they share the fit": unseen.size
        > 0,
    }
    return tuple(note for note, applies in notes.items() if applies)


def _always(right: bool) -> str:
    return "never wrong" if right else "always wrong"


def _check_share(field: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{field} must be between 0 and 1, got {value:g}")


def _numbers(values: Sequence[float] | Floats) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
