"""Choosing classes of many rows at once: the k largest, and k random draws."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

_SETS_PER_CLASS_KEPT = 4
_AT_ONCE = 2**14  # uniform numbers that stay in the processor's cache
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


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


class Randomness(Protocol):
    """Where uniform numbers come from: a NumPy generator, or `RowRandomness`."""

    def random(self, size: tuple[int, int], /) -> npt.NDArray[np.float64]:
        """Return the next uniform numbers in [0, 1), a row of them for each row."""


class RowRandomness:
    """Uniform numbers of which each row's depend on its seed alone, whatever rows are beside it.

    Args:
      seeds: uint64 [n], hashes; one for each row that numbers will be asked for, in order.
    """

    def __init__(self, seeds: npt.NDArray[np.uint64]) -> None:
        self._seeds, self._next = seeds, 0

    def random(self, size: tuple[int, int], /) -> npt.NDArray[np.float64]:
        """Return the uniform numbers of the next rows."""
        rows, draws = size
        start, self._next = self._next, self._next + rows
        return row_uniforms(self._seeds[start : self._next], draws)


def row_uniforms(seeds: npt.NDArray[np.uint64], draws: int) -> npt.NDArray[np.float64]:
    """Make each row's uniform numbers of its seed alone, whatever rows are beside it.

    Number i of a row is the output of SplitMix64 for its seed and the counter i.

    Args:
      seeds: uint64 [n], hashes.
      draws: random numbers for each row.

    Returns:
      float64 [n, draws] in [0, 1), multiples of 2^-53.

    References: Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    counters = _GOLDEN * np.arange(1, draws + 1, dtype=np.uint64)
    uniforms = np.empty((len(seeds), draws))
    step = max(1, _AT_ONCE // max(1, draws))
    for start in range(0, len(seeds), step):
        mixed = seeds[start : start + step, None] + counters
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed ^= mixed >> np.uint64(shift)
            mixed *= np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        np.multiply(mixed >> np.uint64(11), 2.0**-53, out=uniforms[start : start + step])
    return uniforms


def draw_classes(mass: Float32, draws: int, rng: Randomness) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
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
    return tally(drawn)


def tally(drawn: npt.NDArray[np.intp]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Count equal neighbours of sorted rows.

    Args:
      drawn: integers [n, draws], each row ascending.

    Returns:
      The distinct ones, int32 [n, draws], ascending and then -1, and how often each is there, float32 [n, draws].
    """
    rows, draws = drawn.shape
    is_new = np.ones(drawn.shape, bool)
    is_new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = np.cumsum(is_new, axis=1) - 1
    place = (slot + np.arange(rows)[:, None] * draws).ravel()
    counts = np.bincount(place, minlength=rows * draws).astype(np.float32)
    distinct = np.full(rows * draws, -1, np.int32)
    distinct[place] = drawn.ravel()
    return distinct.reshape(rows, draws), counts.reshape(rows, draws)
