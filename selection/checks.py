"""Check the arguments of the selection functions: one sentence for each rule, with the field, the value and the way out."""

from __future__ import annotations

import math
import operator
from typing import SupportsFloat, SupportsIndex

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def as_vector(field: str, values: npt.ArrayLike) -> npt.NDArray[np.floating]:
    """Return a one-dimensional float array; float32 and float64 are kept, everything else becomes float64.

    Raises:
      ValueError: the values are not numbers or not in one dimension.
    """
    array = _as_floats(field, values)
    if array.ndim != 1:
        raise ValueError(f"{field} must have one dimension, one value per example, got shape {array.shape}")
    return array


def as_gains(gains: npt.ArrayLike, field: str = "gains") -> npt.NDArray[np.floating]:
    """Return gains as a one-dimensional float array after checking that there is one and none is negative, NaN or infinite."""
    array = as_vector(field, gains)
    if array.size == 0:
        raise ValueError(f"{field} must hold at least one example, got none")
    require_each(field, array, np.isfinite(array) & (array >= 0), "finite and at least 0")
    return array


def as_scores(field: str, scores: npt.ArrayLike) -> Floats:
    """Return logits or log-probabilities [examples, classes] in float64; -inf is an impossible class.

    Raises:
      ValueError: fewer than two classes, NaN, +inf, or an example without a possible class.
    """
    array = np.asarray(_as_floats(field, scores), np.float64)
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError(
            f"{field} must have shape [examples, classes] with at least 2 classes, got shape {array.shape}"
        )
    bad = np.flatnonzero(~(array.max(axis=1) > -np.inf) | (array.max(axis=1) == np.inf))
    if bad.size:
        raise ValueError(
            f"{field} must be numbers below +inf with a finite one in each row, got {array[bad[0]]} in row {bad[0]:,}"
        )
    return array


def as_log_probabilities(field: str, logprobs: npt.ArrayLike) -> Floats:
    """Return log-probabilities in float64, normalised exactly.

    Raises:
      ValueError: a row's probabilities do not sum to one within the rounding of half-precision storage.
    """
    array = as_scores(field, logprobs)
    totals = np.exp(np.minimum(array, 700.0)).sum(axis=1)
    wrong = np.flatnonzero(np.abs(totals - 1) > 0.02)
    if wrong.size:
        raise ValueError(
            f"{field} must hold log-probabilities, whose exponentials sum to 1 in each row, got the sum "
            f"{totals[wrong[0]]:.6g} in row {wrong[0]:,}; apply log_softmax to logits first"
        )
    return np.asarray(array - np.log(totals)[:, None])


def as_labels(labels: npt.ArrayLike, examples: int, classes: int) -> npt.NDArray[np.int64]:
    """Return true classes as int64 [examples] after checking their number and range."""
    array = np.asarray(labels)
    if array.ndim != 1 or len(array) != examples:
        raise ValueError(f"labels must have one entry for each of the {examples:,} examples, got shape {array.shape}")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"labels must be whole numbers (class indices), got dtype {array.dtype}")
    if array.size and (array.min() < 0 or array.max() >= classes):
        value = array[(array < 0) | (array >= classes)][0]
        raise ValueError(f"labels must be classes from 0 to {classes - 1}, got {value}")
    return array.astype(np.int64)


def as_wrong(wrong: SupportsFloat) -> float:
    """Return the number of wrong labels, a real number of at least 0."""
    value = float(wrong)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"wrong must be a finite number of wrong labels, at least 0, got {value:g}")
    return value


def as_budget(budget: SupportsIndex, pool: int) -> int:
    """Return the number of labels to buy, a whole number between 1 and the size of the pool."""
    try:
        value = operator.index(budget)
    except TypeError:
        raise ValueError(f"budget must be a whole number of examples, got {budget!r}") from None
    if value < 1:
        raise ValueError(f"budget must be at least 1 example, got {value:,}")
    if value > pool:
        raise ValueError(f"budget must be at most the {pool:,} unlabelled examples, got {value:,}")
    return value


def require_same_length(**arrays: npt.NDArray[np.generic]) -> None:
    """Require that arrays have one entry for the same examples."""
    (first, reference), *others = arrays.items()
    for name, array in others:
        if len(array) != len(reference):
            raise ValueError(
                f"{name} must have one entry for each of the {len(reference):,} entries of {first}, got {len(array):,}"
            )


def require_each(field: str, array: npt.NDArray[np.generic], good: npt.NDArray[np.bool_], rule: str) -> None:
    """Require that a rule holds for every entry; name the first entry that breaks it."""
    if not good.all():
        first = int(good.argmin())
        raise ValueError(f"{field} must be {rule}, got {array[first]} at index {first:,}")


def _as_floats(field: str, values: npt.ArrayLike) -> npt.NDArray[np.floating]:
    array = np.asarray(values)
    if array.dtype in (np.float32, np.float64):
        return array
    if not (np.issubdtype(array.dtype, np.number) or array.size == 0) or np.iscomplexobj(array):
        raise ValueError(f"{field} must be real numbers, got dtype {array.dtype}")
    return array.astype(np.float64)
