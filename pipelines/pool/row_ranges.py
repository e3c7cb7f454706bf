"""Sets of rows as ranges: first row, row after the last, and so on, ascending."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def to_ranges(rows: Rows) -> tuple[int, ...]:
    """Describe ascending rows by the ranges that they make."""
    if not len(rows):
        return ()
    borders = np.flatnonzero(np.diff(rows) != 1)
    starts, stops = np.r_[rows[0], rows[borders + 1]], np.r_[rows[borders], rows[-1]] + 1
    return tuple(np.stack([starts, stops], axis=1).ravel().tolist())


def from_ranges(ranges: Sequence[int]) -> Rows:
    """List the rows of ranges."""
    parts = [np.arange(start, stop) for start, stop in zip(ranges[::2], ranges[1::2], strict=True)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def count(ranges: Sequence[int]) -> int:
    """Count the rows of ranges."""
    return sum(ranges[1::2]) - sum(ranges[::2])
