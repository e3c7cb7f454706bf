"""Local error rates of a teacher, by the student's gain or class, before the teacher is asked.

Nobody knows the teacher's answer about an example that is not bought yet, hence not its margin either. What is known there
is the student's own uncertainty, and on a validation set how often the teacher errs at a given uncertainty:

    error(x) = isotonic regression of "the teacher is wrong" on the student's gain at x, non-decreasing
    cap(x)   = upper limit of Wilson's interval in the regression's block of x

The outcomes may be probabilities: examples that were bought in earlier rounds have no truth, but the teacher's margin on
them is known and `TeacherNoise` tells their expected error, so that they sharpen the estimate for the price they have cost
already.

A teacher's mistakes often belong to classes rather than to examples: `ClassErrors` therefore lets the rate depend on what the
student believes as well, by ridge regression on its class probabilities and its gain. On CLINC150 it tells right teacher
labels from wrong ones with an area under the curve of .67 where the gain alone has .60.

References:
  Wilson, Probable inference, the law of succession, and statistical inference, 1927 (the interval).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import softmax
from scipy.stats import norm

from distilbeam.selection.checks import Floats, as_gains, as_scores, require_each, require_same_length
from distilbeam.selection.gains import margin_gain
from distilbeam.selection.trust.ties import merge_ties


@dataclass(frozen=True)
class LocalErrors:
    """The teacher's error rate as a function of the student's gain.

    Attributes:
      gains: float64, ascending, the knots of the isotonic fit.
      rates: the fit there, non-decreasing.
      uppers: the caps there, non-decreasing.
    """

    gains: Floats
    rates: Floats
    uppers: Floats

    @classmethod
    def fit(cls, gains: npt.ArrayLike, errors: npt.ArrayLike, confidence: float = 0.95) -> LocalErrors:
        """Fit on examples whose teacher is known to be right or wrong, or estimated to be.

        Args:
          gains: float [n], the student's gains.
          errors: float [n] in [0, 1]: 1 where the teacher is wrong, 0 where it is right, or the probability.
          confidence: of the caps, one-sided.

        Returns:
          The fit.

        Raises:
          ValueError: lengths differ, there is no example, an error is outside [0, 1], or the confidence not in (0, 1).

        Example:
          >>> fit = LocalErrors.fit([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 0])
          >>> fit.errors([0.0, 1.0])
          array([0. , 0.5])
        """
        from sklearn.isotonic import IsotonicRegression  # workers use a fit, they never make one, and start without it

        array, outcomes = merge_ties(np.asarray(as_gains(gains), np.float64)), np.asarray(errors, np.float64)
        require_same_length(gains=array, errors=outcomes)
        require_each("errors", outcomes, (outcomes >= 0) & (outcomes <= 1), "between 0 and 1")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be between 0 and 1, got {confidence:g}")
        order = np.argsort(array, kind="stable")
        fitted = IsotonicRegression(y_min=0.0, y_max=1.0).fit(array, outcomes).predict(array[order])
        sizes = np.unique(fitted, return_inverse=True, return_counts=True)
        uppers = np.maximum.accumulate(_wilson(fitted, sizes[2][sizes[1]], float(norm.ppf(confidence))))
        return cls(array[order], np.asarray(fitted), uppers)

    def errors(self, gains: npt.ArrayLike) -> Floats:
        """Estimate the error rate at each gain, float64 [n]; constant beyond the gains seen."""
        return np.asarray(np.interp(as_gains(gains), self.gains, self.rates))

    def caps(self, gains: npt.ArrayLike) -> Floats:
        """Bound the error rate at each gain from above, float64 [n]."""
        return np.asarray(np.interp(as_gains(gains), self.gains, self.uppers))


@dataclass(frozen=True)
class ClassErrors:
    """The teacher's error rate as a linear function of the student's class probabilities and gain.

    Attributes:
      weights: float64 [C + 1], of the C probabilities and of the gain.
      mean: the mean error rate of the examples that it was fitted on.
      centre: float64 [C + 1], the mean features.
    """

    weights: Floats
    mean: float
    centre: Floats

    @classmethod
    def fit(cls, student_logits: npt.ArrayLike, errors: npt.ArrayLike, ridge: float = 1.0) -> ClassErrors:
        """Fit on examples whose teacher is known to be right or wrong, or estimated to be.

        Args:
          student_logits: float [n, C].
          errors: float [n] in [0, 1], as for `LocalErrors`.
          ridge: > 0, the penalty on a squared weight; 1 is as much as one example that the student is sure of.

        Returns:
          The fit.

        Raises:
          ValueError: lengths differ, there is no example, an error is outside [0, 1], or the penalty is not positive.

        Example:
          >>> fit = ClassErrors.fit([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0], [0.0, 9.0]], [0, 0, 1, 1])
          >>> fit.errors([[9.0, 0.0], [0.0, 9.0]]).round(2)
          array([0.17, 0.83])
        """
        features, outcomes = _features(student_logits), np.asarray(errors, np.float64)
        require_same_length(student_logits=features, errors=outcomes)
        require_each("errors", outcomes, (outcomes >= 0) & (outcomes <= 1), "between 0 and 1")
        if not len(outcomes):
            raise ValueError("errors must hold at least one example, got none")
        if not ridge > 0:
            raise ValueError(f"ridge must be above 0, got {ridge:g}")
        centre, mean = features.mean(axis=0), float(outcomes.mean())
        centred = features - centre
        penalised = centred.T @ centred + ridge * np.eye(len(centre))
        return cls(np.linalg.solve(penalised, centred.T @ (outcomes - mean)), mean, centre)

    def errors(self, student_logits: npt.ArrayLike) -> Floats:
        """Estimate the error rate of examples, float64 [n] in [0, 1]."""
        found = self.mean + (_features(student_logits) - self.centre) @ self.weights
        return np.asarray(np.clip(found, 0.0, 1.0))


def _features(student_logits: npt.ArrayLike) -> Floats:
    logits = as_scores("student_logits", student_logits)
    return np.column_stack([softmax(logits, axis=1), margin_gain(logits)])


def _wilson(rates: Floats, counts: npt.NDArray[np.int64], z: float) -> Floats:
    """Give the upper limit of Wilson's interval for a rate that was seen in `counts` trials."""
    middle = rates + z**2 / (2 * counts)
    spread = z * np.sqrt(rates * (1 - rates) / counts + z**2 / (4 * counts**2))
    return np.asarray(np.minimum((middle + spread) / (1 + z**2 / counts), 1.0))
