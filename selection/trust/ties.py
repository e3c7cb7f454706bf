"""Values that are equal but for rounding: a softmax of the same logits differs between processors in its last bits.

What is estimated from an order of such values must not depend on which of them came out larger.
"""

from __future__ import annotations

import numpy as np

from distilbeam.selection.checks import Floats

SAME = 1e-9  # of values in [0, 1] in float64: far above their rounding, far below what an estimate could tell apart


def merge_ties(values: Floats) -> Floats:
    """Give values that differ by rounding alone one value, that of the least of them.

    Args:
      values: float64 [n], finite. Each that is within `SAME` of the next smaller one belongs to its group.

    Returns:
      float64 [n].

    Example:
      >>> merge_ties(np.array([0.1 + 0.2, 0.3, 0.5])).tolist()
      [0.3, 0.3, 0.5]
    """
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    first = np.concatenate([[True], np.diff(ascending) > SAME]) if len(values) else np.zeros(0, bool)
    merged = np.empty_like(values)
    merged[order] = ascending[first][np.cumsum(first) - 1]
    return merged
