"""The usable rows of a batch, of which a network can learn: the others are found one by one, each with its reason.

A batch that cannot be made into an input is halved until the rows that are in the way stand alone, so that k of n rows cost
at most about 2 k log2 n attempts; a batch without any costs one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.config import InputError, MakeInput

LARGEST = 1e18  # the square of a larger number is beyond float32


@dataclass(frozen=True)
class UsableRows:
    """What became of a batch.

    Attributes:
      inputs: of the usable rows, [usable, ...]; None where no row is usable.
      rows: int64 [usable], their rows in the batch, ascending.
      reasons: why each of the other rows is not usable, by its row.
    """

    inputs: npt.NDArray[Any] | None
    rows: npt.NDArray[np.int64]
    reasons: dict[int, str]


def find_usable(make: MakeInput, batch: pa.RecordBatch, shape: tuple[int, ...] | None = None) -> UsableRows:
    """Make the input of the rows of which it can be made.

    Args:
      make: what `make_input` returned.
      batch: with the columns that it reads.
      shape: of one row's input; that of the first row which has one without it.

    Returns:
      Inputs, rows and reasons. A row is not usable where it has no input (a missing value, bytes that are no image), one of
      another shape, or one with numbers that are not finite or so large that their square is not.
    """
    parts: list[npt.NDArray[Any]] = []
    rows: list[npt.NDArray[np.int64]] = []
    reasons: dict[int, str] = {}
    for start, made in _pieces(make, batch, 0):
        if isinstance(made, str):
            reasons[start] = made
            continue
        shape = made.shape[1:] if shape is None else shape
        if made.shape[1:] != shape:
            message = f"its input has the shape {list(made.shape[1:])}, that of the others is {list(shape)}"
            reasons |= dict.fromkeys(range(start, start + len(made)), message)
            continue
        odd = odd_rows(made)
        reasons |= {start + row: reason_of(made[row]) for row in np.flatnonzero(odd).tolist()}
        parts.append(made[~odd] if odd.any() else made)
        rows.append(start + np.flatnonzero(~odd))
    inputs = None if not parts else parts[0] if len(parts) == 1 else np.concatenate(parts)
    return UsableRows(inputs, np.concatenate(rows) if rows else np.zeros(0, np.int64), reasons)


def _pieces(make: MakeInput, batch: pa.RecordBatch, start: int) -> Iterator[tuple[int, npt.NDArray[Any] | str]]:
    """Give the first row of each piece of a batch, with its input or the reason why its only row has none."""
    try:
        made: Any = make(batch)
    except InputError as e:
        if batch.num_rows <= 1:
            yield start, str(e)
            return
    else:
        if not isinstance(made, np.ndarray):
            raise InputError("a student's input must be one array, its function gives several by name")
        yield start, made
        return
    half = batch.num_rows // 2
    yield from _pieces(make, batch.slice(0, half), start)
    yield from _pieces(make, batch.slice(half), start + half)


def odd_rows(inputs: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Tell which rows [n, ...] hold numbers that are not finite or so large that their square is not."""
    if inputs.dtype.kind != "f" or not inputs.size or (inputs.max() <= LARGEST and inputs.min() >= -LARGEST):
        return np.zeros(len(inputs), bool)
    rows = inputs.reshape(len(inputs), -1)
    return np.asarray(~((rows.max(axis=1) <= LARGEST) & (rows.min(axis=1) >= -LARGEST)))  # NaN is neither


def reason_of(values: npt.NDArray[Any]) -> str:
    """Say which number of an odd row is wrong, and how."""
    flat = values.reshape(-1)
    with np.errstate(invalid="ignore"):
        at = int(np.flatnonzero(~(np.abs(flat) <= LARGEST))[0])
    rule = "is not a finite number" if not np.isfinite(flat[at]) else "is too large for a network of float32"
    return f"number {at + 1:,} of its input is {flat[at]:g}, which {rule}"
