"""Choosing classes of many rows at once: the k largest, and k random draws."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

_SETS_PER_CLASS_KEPT = 4


def largest(values: Float32, k: int) -> npt.NDArray[np.intp]:
    """Find the k largest values of each row.

    Args:
      values: float32 [n, C] without NaN.
      k: how many, at most C.

    Returns:
      Integers [n, k], indices in descending order of value; equal values ascend by index.
    """
    if len(values) == 0:
        return np.empty((0, k), np.intp)
    candidates = np.flatnonzero(values >= _bound(values, k))
    rows, classes = np.divmod(candidates, values.shape[1])
    counts = np.bincount(rows, minlength=len(values))
    place = np.arange(len(candidates)) - np.repeat(np.cumsum(counts) - counts, counts)
    keys = np.full((len(values), counts.max()), np.iinfo(np.uint64).max)
    keys[rows, place] = _descending(values.ravel()[candidates]) | classes.astype(np.uint64)
    keys.sort(axis=1)
    return (keys[:, :k] & np.uint64(0xFFFFFFFF)).astype(np.intp)


def _descending(values: Float32) -> npt.NDArray[np.uint64]:
    """Map values to the upper halves of integers that ascend where the values descend.

    The bits of positive floats ascend like the numbers, those of negative ones descend (IEEE 754).
    """
    bits = (values + np.float32(0)).view(np.uint32)  # the sum turns -0 into 0, which it equals
    ascending = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    return (~ascending).astype(np.uint64) << np.uint64(32)


def _bound(values: Float32, k: int) -> Float32:
    """Give a column that at least k values of each row reach, and not many more.

    The k-th largest of the maxima of disjoint sets of classes is at most the k-th largest value. The sets are strided, so
    that the maxima are taken over whole rows of memory.
    """
    rows, classes = values.shape
    sets = _SETS_PER_CLASS_KEPT * k
    size = classes // sets
    if size >= 2:
        values = values[:, : size * sets].reshape(rows, size, sets).max(axis=1)
    count = values.shape[1]
    return np.partition(values, count - k, axis=1)[:, count - k, None]


def draw_classes(
    mass: Float32, draws: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Draw classes with probabilities in proportion to their mass, independently and with replacement.

    Args:
      mass: float32 [n, C], at least 0; n at most 4,096.
      draws: draws for each row.
      rng: source of the randomness.

    Returns:
      The distinct classes drawn, int32 [n, draws], ascending and then -1; how often each was drawn, float32 [n, draws],
      0 beside -1. The expected frequency of a class is its probability, within 2^-36.
    """
    rows, classes = mass.shape
    if rows == 0:
        return np.empty((0, draws), np.int32), np.empty((0, draws), np.float32)
    cumulative = np.cumsum(mass, axis=1, dtype=np.float64)
    cumulative /= cumulative[:, -1:]
    offset = np.arange(rows, dtype=np.float64)[:, None]
    # The bound keeps offset + u below offset + 1 after rounding, for up to 4,096 rows.
    uniform = np.minimum(np.sort(rng.random((rows, draws)), axis=1), 1 - 2**-36)
    found = np.searchsorted((cumulative + offset).ravel(), (uniform + offset).ravel(), side="right")
    drawn = found.reshape(rows, draws) - np.arange(rows)[:, None] * classes
    return _tally(drawn)


def _tally(drawn: npt.NDArray[np.intp]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Count equal neighbours of sorted rows."""
    rows, draws = drawn.shape
    is_new = np.ones(drawn.shape, bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = np.cumsum(is_new, axis=1) - 1
    place = (slot + np.arange(rows)[:, None] * draws).ravel()
    counts = np.bincount(place, minlength=rows * draws).astype(np.float32)
    distinct = np.full(rows * draws, -1, np.int32)
    distinct[place] = drawn.ravel()
    return distinct.reshape(rows, draws), counts.reshape(rows, draws)
