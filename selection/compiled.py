"""The loops over all gains and over all seats, compiled by numba, for pools that are large enough to repay loading it.

The functions below are plain Python with the arithmetic of the numpy code, operation by operation, so that both give the
same integers and choose the same points: histograms are exact, and floats are added, divided and rounded in the same order
and precision (numba reorders nothing unless it is asked to). `kernels` compiles them, or gives None where numba is not
installed or the input is small; the callers then do the same with numpy.

Cost: 1 to 3 ns for each gain in a histogram and about 1 ns in a refinement. Loading numba takes about half a second, once in a
process; compiling takes seconds, once on a machine, because numba keeps the code beside this file or in the user's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Patterns = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float64]

MIN_SIZE = 1 << 18  # of an input for which numba is loaded
# A count and a sum of deficits share one integer, so that a gain costs one addition: 2^19 deficits below 2^24 fit 43 bits,
# and 2^19 counts the 20 bits above them.
_COUNT_SHIFT = 43
_FLUSH = 1 << 19
_BLOCK = 1 << 12  # gains that are marked at a time


class Kernels(NamedTuple):
    """The compiled functions."""

    count_bins: Callable[[Patterns, Ints, Ints], None]
    count_patterns: Callable[[Patterns, np.uint32, Ints], None]
    sum_lows: Callable[[Patterns, int, int, Ints], None]
    line_up: Callable[[Floats, Ints, Ints, int, float, Ints, Floats, Floats], None]
    fill_seats: Callable[[Floats, Floats, Floats, Floats, Ints], tuple[int, int]]


def kernels(size: int) -> Kernels | None:
    """Return the compiled functions for an input of `size` entries, or None if numpy is to be used."""
    return _load() if size >= MIN_SIZE else None


@cache
def _load() -> Kernels | None:
    try:
        import numba
    except ImportError:  # not installed, or not made for this numpy
        return None

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(function, nogil=True, cache=True)
        except RuntimeError:  # no folder in which the machine code could be kept
            return numba.njit(function, nogil=True)

    functions = (_count_bins, _count_patterns, _sum_lows, _line_up, _fill_seats)
    return Kernels(*(compiled(function) for function in functions))


def _count_bins(patterns: Patterns, counts: Ints, sums: Ints) -> None:
    """Add the number and the sum of deficits of each bin; `distilbeam.selection.sketch.bins` defines both.

    Both halves of (g - lo) / g are whole multiples of g's last place, which cancels: what is divided are the significands.
    The bins of zero get sums without meaning.
    """
    packed = np.zeros(counts.size, np.int64)
    scale = np.float32(2147483648.0)
    for start in range(0, patterns.size, _FLUSH):
        for pattern in patterns[start : start + _FLUSH]:
            above = np.float32(pattern & np.uint32(0xFFFF))
            significand = np.float32((pattern & np.uint32(0x7FFFFF)) | np.uint32(0x800000))
            deficit = np.int64(np.rint(above / significand * scale))
            packed[pattern >> np.uint32(16)] += (np.int64(1) << _COUNT_SHIFT) + deficit
        for number in range(counts.size):
            counts[number] += packed[number] >> _COUNT_SHIFT
            sums[number] += packed[number] & ((np.int64(1) << _COUNT_SHIFT) - 1)
            packed[number] = 0


def _count_patterns(patterns: Patterns, first: np.uint32, counts: Ints) -> None:
    """Count each of the bit patterns from `first` on.

    Few gains lie there. A first loop, which the compiler turns into vector instructions, marks them; a second one looks for
    marks eight gains at a time.
    """
    size = np.uint32(counts.size)
    marks = np.zeros(_BLOCK, np.uint8)
    eights = marks.view(np.uint64)
    for start in range(0, patterns.size, _BLOCK):
        block = patterns[start : start + _BLOCK]
        for place in range(block.size):
            marks[place] = np.uint32(block[place] - first) < size  # below `first` it wraps around to a large number
        marks[block.size :] = 0
        for eight in range(eights.size):
            if eights[eight]:
                for place in range(8 * eight, 8 * eight + 8):
                    if marks[place]:
                        counts[block[place] - first] += 1


def _sum_lows(patterns: Patterns, first: int, stop: int, sums: Ints) -> None:
    """Sum the low 16 bits of the patterns from `first` up to `stop`, by bin."""
    for pattern in patterns:
        number = np.int64(pattern)
        if first <= number < stop:
            sums[number >> 16] += number & 0xFFFF


def _line_up(
    array: Floats, chunk: Ints, order: Ints, carry: int, mass: float, points: Ints, masses: Floats, sums: Floats
) -> None:
    """Write points in the order in which they meet, the carry first, with their masses and the sums of these so far."""
    total = mass
    points[0], masses[0], sums[0] = carry, mass, total
    for i in range(order.size):
        point = chunk[order[i]]
        total += array[point]
        points[i + 1], masses[i + 1], sums[i + 1] = point, array[point], total


def _fill_seats(sums: Floats, masses: Floats, places: Floats, fights: Floats, winners: Ints) -> tuple[int, int]:
    """Decide every seat of `distilbeam.selection.rounding`, one after the other.

    Args:
      sums: cumulative sum of `masses`.
      masses: masses of the points in the order in which they meet.
      places: uniform random numbers that draw the champion of each seat.
      fights: uniform random numbers that decide between the champion and the crosser.
      winners: receives the winner of each seat.

    Returns:
      The last crosser and the point that is undecided after it; -1 and -1 if there is no seat.
    """
    crosser, survivor, start, point = -1, -1, 0, 0
    for seat in range(winners.size):
        point += 1
        while sums[point] < seat + 1:
            point += 1
        inside = sums[point - 1] - np.float64(seat)
        place = np.float64(seat) + places[seat] * inside
        low, high = start, point - 1  # the first sum above `place`, but not the crosser's
        while low < high:
            middle = (low + high) // 2
            if sums[middle] > place:
                high = middle
            else:
                low = middle + 1
        champion = survivor if low == crosser else low
        loss = 1.0 - masses[point]
        if fights[seat] * (loss + 1.0 - inside) < loss:
            winners[seat], survivor = champion, point
        else:
            winners[seat], survivor = point, champion
        crosser = start = point
    return crosser, survivor
