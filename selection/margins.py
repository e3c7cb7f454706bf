"""The margin of a classifier: the difference of its two largest probabilities, and the class it names."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from distilbeam.selection.checks import Floats


def top_margins(logprobs: Floats) -> Floats:
    """Return p_1 - p_2 of each row, p_1 >= p_2 the two largest probabilities.

    Args:
      logprobs: float64 [n, C] log-probabilities, C >= 2.

    Returns:
      float64 [n] in [0, 1].
    """
    top = np.partition(logprobs, -2, axis=1)[:, -2:]
    return np.asarray(np.exp(top[:, 1]) * -np.expm1(top[:, 0] - top[:, 1]))


def ranks_of(logprobs: Floats, labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return how many classes come before the labelled one, by probability and, among equals, by number.

    Args:
      logprobs: float64 [n, C].
      labels: int64 [n].

    Returns:
      int64 [n]; 0 where the label is the most probable class.
    """
    own = np.take_along_axis(logprobs, labels[:, None], axis=1)
    before = np.arange(logprobs.shape[1]) < labels[:, None]
    return np.asarray(((logprobs > own) | ((logprobs == own) & before)).sum(axis=1))
