"""Numbers in the type that a model reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from distilbeam.inputs.config import InputError


def converted(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Convert numbers to another type.

    Args:
      array: numbers [n, ...].
      dtype: the type that a model reads.

    Raises:
      InputError: a number is beyond the type, where it would become infinite or another number.
    """
    if np.can_cast(array.dtype, dtype, "safe") or not array.size or dtype.kind == "b":
        return array.astype(dtype, copy=False)
    limits: Any = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    fits = (array >= limits.min) & (array <= limits.max)
    if dtype.kind == "f":
        fits |= ~np.isfinite(array)
    if not fits.all():
        row = int(np.unravel_index(int((~fits).argmax()), fits.shape)[0]) if fits.ndim else 0
        raise InputError(
            f"the input of row {row:,} has {array[~fits].flat[0]}, the model reads numbers of type {dtype.name} from "
            f"{limits.min} to {limits.max}"
        )
    return array.astype(dtype, copy=False)
