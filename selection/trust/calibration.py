"""Temperature calibration of the teacher and its expected calibration error.

The temperature T > 0 minimises the sum over the validation labels of -log softmax(log-probabilities / T)
plus (1/T - 1)^2 / 2, both convex in 1/T. It changes how sure the teacher says it is, never which class it names. The ridge
weighs as much as one observation of unit information, as in `BeliefPool`, and vanishes beside a few hundred labels. Without it a teacher
whose few errors are near ties is made ever more certain: one error on 200 rows gave T = 0.01. With it, on n rows of C classes,
1/T is at most 1/2 + sqrt(1/4 + (C - 1) n / e), whatever the rows are.

References:
  Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599 (temperature scaling and
  the expected calibration error with bins of equal width).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax

from distilbeam.selection.checks import Floats, as_labels, as_scores

_HOTTEST = 100.0
_RIDGE = 1.0  # as much as one observation's unit of information, as in `BeliefPool`
_FEW_LABELS = 100
_LEAST_LOG_PROBABILITY = -60.0  # an impossible class that turns out true costs this much, not infinitely much


class Calibration(NamedTuple):
    """A fitted temperature and what it does to the teacher.

    Attributes:
      temperature: T; divide log-probabilities by it and normalise.
      nll_before, nll_after: mean negative log-likelihood of the validation labels, in nats.
      ece_before, ece_after: expected calibration error, in [0, 1].
      note: what the fit fell back to and how few labels it rests on, empty if neither.
    """

    temperature: float
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    note: str


def fit_temperature(teacher_logprobs: npt.ArrayLike, labels: npt.ArrayLike) -> Calibration:
    """Fit the temperature that minimises the negative log-likelihood of the validation labels and a ridge towards 1.

    Args:
      teacher_logprobs: float [n, C], logits or log-probabilities on a validation set that the teacher has not seen.
      labels: int [n], its true classes.

    Returns:
      The temperature, between 1/100 and 100, with the likelihood and the calibration error before and after. A teacher that
      is never wrong keeps T = 1, and `note` says so; it also says when there are fewer than 100 labels.

    Raises:
      ValueError: shapes differ, a label is not a class, or there are no labels.

    Example:
      >>> round(fit_temperature([[2.0, 0.0]] * 3 + [[0.0, 2.0]], [0, 0, 0, 0]).temperature, 3)  # without the ridge 1.82
      1.499
    """
    from scipy.optimize import minimize_scalar  # workers use a temperature, they never fit one, and start without it

    logits, truth = _labelled(teacher_logprobs, labels)
    temperature, notes = 1.0, ["the temperature stays 1: the teacher is never wrong on the validation labels"]
    if (logits.argmax(axis=1) != truth).any():
        bound = math.log(_HOTTEST)
        best = minimize_scalar(
            lambda log_t: len(truth) * _nll(logits / math.exp(log_t), truth) + _RIDGE / 2 * math.expm1(-log_t) ** 2,
            bounds=(-bound, bound),
            method="bounded",
            options={"xatol": 1e-8},
        )
        temperature = math.exp(best.x)
        notes = [] if abs(best.x) < bound - 1e-3 else [f"the temperature is at its bound, {temperature:.4g}"]
    if len(truth) < _FEW_LABELS:
        notes.append(f"the temperature rests on only {len(truth):,} validation labels")
    cooled = logits / temperature
    return Calibration(
        temperature,
        _nll(logits, truth),
        _nll(cooled, truth),
        expected_calibration_error(logits, truth),
        expected_calibration_error(cooled, truth),
        "; ".join(notes),
    )


def expected_calibration_error(logprobs: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 15) -> float:
    """Compute the expected calibration error of the most probable class.

    Args:
      logprobs: float [n, C], logits or log-probabilities.
      labels: int [n], true classes.
      bins: number of equal bins of the confidence in (0, 1].

    Returns:
      The mean over examples of |accuracy - confidence| of the bin, in [0, 1].

    Raises:
      ValueError: shapes differ, a label is not a class, there are no labels, or bins is below 1.

    Example:
      >>> round(expected_calibration_error(np.log([[0.8, 0.2], [0.8, 0.2]]), [0, 1]), 6)
      0.3
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    logits, truth = _labelled(logprobs, labels)
    confidence = np.exp(log_softmax(logits, axis=1).max(axis=1))
    numbers = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    surplus = np.bincount(numbers, weights=(logits.argmax(axis=1) == truth) - confidence)
    return float(np.abs(surplus).sum() / len(truth))


def _labelled(logprobs: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, npt.NDArray[np.int64]]:
    logits = as_scores("teacher_logprobs", logprobs)
    if not len(logits):
        raise ValueError("labels must hold at least one validation example, got none")
    return logits, as_labels(labels, *logits.shape)


def _nll(logits: Floats, labels: npt.NDArray[np.int64]) -> float:
    own = np.take_along_axis(log_softmax(logits, axis=1), labels[:, None], axis=1)
    return float(-np.maximum(own, _LEAST_LOG_PROBABILITY).mean())
