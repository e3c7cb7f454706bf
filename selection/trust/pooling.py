"""Pooled beliefs: the teacher's and the student's joined as validation data says, for labels that may be wrong.

A student that has not been trained on x yet knows something about x that the teacher does not, and examples are bought
where the student is unsure, which is often where the teacher errs: there the teacher is less reliable than a calibration
over all examples says. The log-linear pool

    log y(x) = (a + b g(x)) log teacher(x) + c log student(x) - log Z(x)

with g(x) the student's gain has three weights, fitted by maximum likelihood of the true classes of a validation set that
neither has been trained on. b = c = 0 is temperature scaling with T = 1/a; b < 0 trusts the teacher less where the student
is unsure; a weak teacher beside a good student gets little weight, so that its labels teach little instead of harm. The
negative log-likelihood is convex in the weights; a small ridge towards the plain temperature keeps them finite on separable
data. Cost: a dozen Newton steps over the validation set.

References:
  Genest, Zidek, Combining Probability Distributions, 1986 (the logarithmic opinion pool); Guo et al., arXiv 1706.04599
  (temperature scaling, which it contains). The use for labels that were chosen by the student is this project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from distilbeam.selection.checks import Floats, as_labels, as_scores, require_same_length
from distilbeam.selection.gains import margin_gain

_LEAST = -20.0  # log-probabilities below are as good as impossible; an impossible truth must not cost infinitely much
_RIDGE = 1.0  # as much as one observation's unit of information
_STEPS = 50


@dataclass(frozen=True)
class BeliefPool:
    """The weights of the pool.

    Attributes:
      teacher: a, of the teacher's log-probabilities.
      doubt: b, of the same times the student's gain.
      student: c, of the student's log-probabilities.
    """

    teacher: float
    doubt: float
    student: float

    @classmethod
    def fit(cls, teacher_logprobs: npt.ArrayLike, student_logits: npt.ArrayLike, labels: npt.ArrayLike) -> BeliefPool:
        """Fit on a validation set that neither model was trained on.

        Args:
          teacher_logprobs: float [n, C], log-probabilities or logits.
          student_logits: float [n, C], of the student whose choice the labels are.
          labels: int [n], the true classes.

        Returns:
          The weights.

        Raises:
          ValueError: shapes differ, a label is not a class, or there are no labels.
        """
        features = _features(teacher_logprobs, student_logits)
        truth = as_labels(labels, *features.shape[:2])
        if not len(truth):
            raise ValueError("labels must hold at least one validation example, got none")
        start = np.array([1.0, 0.0, 0.0])
        return cls(*map(float, _newton(features, truth, start)))

    def labels(self, teacher_logprobs: npt.ArrayLike, student_logits: npt.ArrayLike) -> Floats:
        """Pool the beliefs about examples.

        Args:
          teacher_logprobs: float [n, C].
          student_logits: float [n, C], of a student that was not trained on these examples.

        Returns:
          float64 [n, C] log-probabilities.

        Raises:
          ValueError: shapes differ.
        """
        weights = np.array([self.teacher, self.doubt, self.student])
        return np.asarray(log_softmax(_features(teacher_logprobs, student_logits) @ weights, axis=1))

    def to_json(self) -> dict[str, Any]:
        """Return plain data that JSON can hold."""
        return {"teacher": self.teacher, "doubt": self.doubt, "student": self.student}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BeliefPool:
        """Rebuild a pool from `to_json`'s data."""
        return cls(data["teacher"], data["doubt"], data["student"])


def _features(teacher_logprobs: npt.ArrayLike, student_logits: npt.ArrayLike) -> Floats:
    """Stack what the weights multiply, [n, C, 3]."""
    teacher = log_softmax(as_scores("teacher_logprobs", teacher_logprobs), axis=1)
    student = log_softmax(as_scores("student_logits", student_logits), axis=1)
    require_same_length(teacher_logprobs=teacher, student_logits=student)
    if teacher.shape != student.shape:
        raise ValueError(
            f"student_logits must have the teacher's {teacher.shape[1]:,} classes, got {student.shape[1]:,}"
        )
    teacher, gain = np.maximum(teacher, _LEAST), margin_gain(student)[:, None]
    return np.stack([teacher, gain * teacher, np.maximum(student, _LEAST)], axis=-1)


def _newton(features: Floats, truth: npt.NDArray[np.int64], start: Floats) -> Floats:
    """Minimise the negative log-likelihood plus the ridge by Newton's method with halved steps."""
    rows = np.arange(len(truth))

    def cost(w: Floats) -> float:
        logprobs = log_softmax(features @ w, axis=1)
        return float(-logprobs[rows, truth].sum() + 0.5 * _RIDGE * ((w - start) ** 2).sum())

    weights, value = start, cost(start)
    for _ in range(_STEPS):
        p = np.exp(log_softmax(features @ weights, axis=1))
        means = np.einsum("nc,ncf->nf", p, features)
        gradient = (means - features[rows, truth]).sum(axis=0) + _RIDGE * (weights - start)
        centred = features - means[:, None]
        hessian = np.einsum("nc,ncf,nch->fh", p, centred, centred, optimize=True) + _RIDGE * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        if gradient @ step < 1e-10:
            break
        share = 1.0
        while (better := cost(weights - share * step)) > value - 1e-4 * share * (gradient @ step) and share > 1e-6:
            share /= 2
        weights, value = weights - share * step, better
    return weights
