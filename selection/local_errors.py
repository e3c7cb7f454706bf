"""Where the teacher errs, as far as the student can tell before the teacher is asked.

Nobody knows the teacher's answer about an example that is not bought yet, hence not its margin either. What is known there
is the student's own uncertainty, and on a validation set how often the teacher errs at a given uncertainty:

    error(x) = isotonic regression of "the teacher is wrong" on the student's gain at x, non-decreasing
    cap(x)   = upper limit of Wilson's interval in the regression's block of x

The outcomes may be probabilities: examples that were bought in earlier rounds have no truth, but the teacher's margin on
them is known and `TeacherNoise` tells their expected error, so that they sharpen the estimate for the price they have cost
already.

References:
  Wilson, Probable inference, the law of succession, and statistical inference, 1927 (the interval).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from distilbeam.selection.checks import Floats, as_gains, require_each, require_same_length


@dataclass(frozen=True)
class LocalErrors:
    """The teacher's error rate as a function of the student's gain.

    Attributes:
      gains: ascending knots.
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

        array, outcomes = np.asarray(as_gains(gains), np.float64), np.asarray(errors, np.float64)
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


def _wilson(rates: Floats, counts: npt.NDArray[np.int64], z: float) -> Floats:
    """Give the upper limit of Wilson's interval for a rate that was seen in `counts` trials."""
    middle = rates + z**2 / (2 * counts)
    spread = z * np.sqrt(rates * (1 - rates) / counts + z**2 / (4 * counts**2))
    return np.asarray(np.minimum((middle + spread) / (1 + z**2 / counts), 1.0))
