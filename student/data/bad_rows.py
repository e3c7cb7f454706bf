"""Rows that a training cannot use, found when they are read and named by their file: no number, out of range, no input.

One such number makes every weight of the student NaN in a single step, long after the row was read and without its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from distilbeam.inputs.config import InputError
from distilbeam.student.data.column_types import Array
from distilbeam.student.data.row_groups import RowGroup
from distilbeam.student.data.usable_rows import odd_rows, reason_of

ID = "example_id"
ALONE = r"\brow 0\b"  # what a row by itself is called by who makes its input


class BadRowError(ValueError):
    """A row that cannot be used.

    Attributes:
      row: its number among those that were looked at.
    """

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row = row


def require_finite(inputs: Array) -> None:
    """Check inputs [n, ...].

    Raises:
      BadRowError: a row holds NaN, an infinity or a number too large for a network.
    """
    bad = np.flatnonzero(odd_rows(inputs))
    if len(bad):
        raise BadRowError(int(bad[0]), f"cannot be used: {reason_of(inputs[bad[0]])}")


def first_without_input(
    make: Callable[[pa.RecordBatch], object], rows: pa.Table | pa.RecordBatch
) -> BadRowError | None:
    """Find the first row of which no input can be made by itself."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_batches([rows])
    for row in range(table.num_rows):
        try:
            for batch in table.slice(row, 1).combine_chunks().to_batches():
                make(batch)
        except InputError as e:
            return BadRowError(row, f"gives no input: {re.sub(ALONE, 'it', str(e))}")
    return None


def require_values(groups: Sequence[RowGroup], column: str, least: float, greatest: float) -> None:
    """Check every value of a scalar column of soft labels.

    Args:
      groups: row groups.
      column: its name.
      least: smallest value allowed.
      greatest: largest; with infinity every finite one.

    Raises:
      ValueError: a value is missing, no number or out of range; the message has file and row.
    """
    for group in groups:
        values = group.read([column])[column].combine_chunks()
        numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        bad = np.flatnonzero(~(np.isfinite(numbers) & (numbers >= least) & (numbers <= greatest)))
        if len(bad):
            rule = f"from {least:g} to {greatest:g}" if np.isfinite(greatest) else f"finite and at least {least:g}"
            row = int(bad[0])
            raise ValueError(
                f"{place_of(group, row)} has {values[row].as_py()} in column {column}, which must be {rule}; correct the "
                "column where it was made, or choose training.objective = 'distill', which does not read it"
            )


def place_of(group: RowGroup, row: int) -> str:
    """Say where a row of a row group is: its file, its number there and its id."""
    before = sum(group.file.metadata.row_group(i).num_rows for i in range(group.number))
    named = ""
    if ID in group.file.schema.names:
        named = f" ({ID} {group.read([ID])[ID][row].as_py()!r})"
    return f"{group.file.path}: row {before + row:,}{named}"
