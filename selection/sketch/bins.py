"""The histogram grid of a gain sketch: the top bits of a float32's bit pattern.

For positive floats the bit pattern, read as an integer, grows with the value, so its top 16 bits number the bins of a
log-spaced grid (128 bins for each factor of two) without a logarithm, the same on every machine. Of a gain g in the bin
[lo, hi) the sketch keeps, besides its count, the deficit

    d = rint(2^31 (g - lo) / g)   in [0, 2^24),    so that    1/g = (1 - 2^-31 d) / lo   within 2.4e-10,

an integer, so that sums of deficits are exact and independent of their order. Everything else, marginals included, uses the
reciprocal *defined* by d, so that sums over bins and sums over gains agree to the last bit that float64 has.

Gains below 2^-126, the smallest normal float32, count as zero: the grid is not log-spaced there.
Cost: about 6 ns for each gain; with numba, where an array is large, 1 to 2 ns (`distilbeam.selection.compiled`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from distilbeam.selection import compiled
from distilbeam.selection.checks import Floats, as_gains, as_vector

Ints = npt.NDArray[np.int64]
Floats32 = npt.NDArray[np.float32]

LOW_BITS = 16
BINS = 0x7F80  # the pattern of +inf begins here
FIRST_BIN = 0x80  # the smallest normal number begins here; bins below hold zero
SMALLEST = float(np.finfo(np.float32).tiny)
UNIT = 2.0**-31  # of a deficit

# Gains taken at a time: temporaries beyond 128 KB would be mapped and unmapped, page by page, for every chunk.
_CHUNK = 1 << 15
_HISTOGRAM_CHUNK = 1 << 17  # sums of deficits below 2^17 * 2^24 are exact in float64
_LOW_MASK = np.uint32((1 << LOW_BITS) - 1)


def as_float32_gains(gains: npt.ArrayLike) -> Floats32:
    """Return gains as a contiguous float32 [n] after checking them; an empty array is allowed.

    Raises:
      ValueError: a gain is negative, NaN, infinite, or too large for float32.
    """
    array = as_vector("gains", gains)
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float32)
    else:
        narrow = np.ascontiguousarray(array, np.float32)
    # Patterns of negative numbers, infinities and NaN, read unsigned, are all above those of finite positive numbers.
    if narrow.size and narrow.view(np.uint32).max() >= BINS << LOW_BITS:
        checked = as_gains(array)
        too_large = checked.max()
        if too_large > np.finfo(np.float32).max:
            raise ValueError(f"gains must fit float32 (at most 3.4e38), got {too_large:g}; divide them by a constant")
        narrow = np.abs(narrow)  # what is left are negative zeros
    return narrow


def chunks(gains: Floats32) -> Iterator[Floats32]:
    """Cut gains into pieces whose temporaries fit the cache."""
    for start in range(0, len(gains), _CHUNK):
        yield gains[start : start + _CHUNK]


def bin_numbers(gains: Floats32) -> npt.NDArray[np.intp]:
    """Return the bin of each gain."""
    return (gains.view(np.uint32) >> np.uint32(LOW_BITS)).astype(np.intp)


def low_bits(gains: Floats32) -> npt.NDArray[np.intp]:
    """Return the position of each gain in its bin, 0 to 65,535."""
    return (gains.view(np.uint32) & _LOW_MASK).astype(np.intp)


def deficits(gains: Floats32, out: Floats32) -> Floats32:
    """Write rint(2^31 (g - lo) / g) of normal gains to `out`, as whole numbers in float32, where they are exact."""
    np.bitwise_and(gains.view(np.uint32), ~_LOW_MASK, out=out.view(np.uint32))
    np.subtract(gains, out, out=out)  # exact: both have the same exponent
    with np.errstate(invalid="ignore"):  # 0 / 0 of gains that are zero; callers leave their bin out
        np.divide(out, gains, out=out)
    np.multiply(out, np.float32(1 / UNIT), out=out)
    return np.rint(out, out=out)


def histogram(gains: Floats32) -> tuple[Ints, Ints]:
    """Count gains and sum their deficits by bin.

    Returns:
      int64 [BINS] counts, and int64 [BINS] sums, 0 in the bins of zero.
    """
    counts, sums = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    if (kernels := compiled.kernels(len(gains))) is not None:
        kernels.count_bins(gains.view(np.uint32), counts, sums)
        sums[:FIRST_BIN] = 0
        return counts, sums
    size = min(len(gains), _HISTOGRAM_CHUNK)
    all_numbers, all_deficits, all_weights = np.empty(size, np.intp), np.empty(size, np.float32), np.empty(size)
    for start in range(0, len(gains), _HISTOGRAM_CHUNK):
        chunk = gains[start : start + _HISTOGRAM_CHUNK]
        numbers, weights = all_numbers[: len(chunk)], all_weights[: len(chunk)]
        np.right_shift(chunk.view(np.uint32), np.uint32(LOW_BITS), out=numbers)
        np.copyto(weights, deficits(chunk, all_deficits[: len(chunk)]))
        found = np.bincount(numbers)
        counts[: len(found)] += found
        sums[FIRST_BIN : len(found)] += np.bincount(numbers, weights=weights)[FIRST_BIN:].astype(np.int64)
    return counts, sums


def reciprocals(gains: Floats32, out: Floats | None = None) -> Floats:
    """Return 1/g of normal gains as the sketch defines it, in float64; of other gains, some number."""
    result = np.multiply(deficits(gains, np.empty_like(gains)), -UNIT, out=out, dtype=np.float64)
    result += 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        np.divide(result, (gains.view(np.uint32) & ~_LOW_MASK).view(np.float32), out=result)
    return np.asarray(result)


def bin_edges(numbers: npt.NDArray[np.integer]) -> Floats:
    """Return the lower edges of bins in float64; the upper edge is the lower one of the next bin."""
    return (numbers.astype(np.uint32) << np.uint32(LOW_BITS)).view(np.float32).astype(np.float64)


def values_in_bin(number: int) -> Floats32:
    """Return the 65,536 float32 values of a bin in increasing order."""
    return (np.uint32(number << LOW_BITS) + np.arange(1 << LOW_BITS, dtype=np.uint32)).view(np.float32)
