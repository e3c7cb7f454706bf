"""A test that a model says the same about the same rows twice.

A model that was stored in training mode drops units at random, or normalises each row by its neighbours. Its first rows
are asked twice in the same company, where answers may differ by rounding alone, and once in other company, where kernels
of other sizes and the scales of 8-bit models may differ by more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from distilbeam.teacher.oom_backoff import Inputs, count_rows, cut
from distilbeam.teacher.protocol import TeacherMisfit

_ROWS = 8
_SAME_COMPANY = (5e-3, 1e-5)  # of the spread of the answers, and of the largest
_OTHER_COMPANY = (0.1, 2**-6)


def require_the_same(forward: Callable[[Any], npt.NDArray[Any]], inputs: Inputs) -> None:
    """Ask a model about its first rows three times.

    Args:
      forward: function from n rows of input to answers [n, C].
      inputs: rows, at least one; only the first are asked, and rows that cannot be answered prove nothing.

    Raises:
      TeacherMisfit: the answers differ by more than rounding.
    """
    rows = cut(inputs, 0, min(_ROWS, count_rows(inputs)))
    few = min(2, count_rows(rows))
    try:
        first, again, fewer = forward(rows), forward(rows), forward(cut(rows, 0, few))
    except Exception:  # noqa: BLE001  (a model may raise anything; the rows' own request says it)
        return
    _compare(first, again, _SAME_COMPANY, "in the same order")
    _compare(first[:few], fewer, _OTHER_COMPANY, f"once with {count_rows(rows)} rows and once with {few}")


def _compare(one: npt.NDArray[Any], two: npt.NDArray[Any], allowed: tuple[float, float], how: str) -> None:
    if one.ndim != 2 or one.shape != two.shape or one.dtype.kind != "f":
        return
    one, two = one.astype(np.float64), two.astype(np.float64)
    known = np.isfinite(one) & np.isfinite(two)
    if not known.any():
        return
    spread = float(one[known].max() - one[known].min())
    difference = float(np.abs(one[known] - two[known]).max())
    if difference > allowed[0] * spread + allowed[1] * float(np.abs(one[known]).max()):
        raise TeacherMisfit(
            f"the teacher answers the same rows differently, asked {how}: by up to {difference:.3g} where its answers spread "
            f"over {spread:.3g}; it was stored in training mode (dropout, batch normalisation) or draws random numbers: call "
            "model.eval() before it is exported"
        )
