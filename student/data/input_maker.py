"""Make the student's input of Arrow columns, in the memory where it is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from distilbeam.inputs.config import InputConfig, InputError, MakeInput, make_input
from distilbeam.student.data.column_types import Array
from distilbeam.student.data.row_groups import RowGroup


@dataclass(frozen=True)
class InputMaker:
    """Makes the student's input of Arrow columns.

    Attributes:
      config: which columns, and how.
      make: what `make_input` returned.
      shape: shape of one row's input.
      dtype: type of its numbers.
      early: whether it takes no work and no more memory than what is stored, so that whole row groups are made.
    """

    config: InputConfig
    make: MakeInput
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    early: bool

    @classmethod
    def of(cls, config: InputConfig, group: RowGroup) -> InputMaker:
        """Make one whose shape is that of a row group's first row.

        Raises:
          ValueError: the input cannot be made, or is not one array of numbers.
        """
        make = make_input(config)
        wanted = [name for name in config.columns if name in group.file.schema.names]
        stored = group.first(wanted)
        made = make(stored)
        if not isinstance(made, np.ndarray) or made.dtype.kind not in "fiub":
            raise InputError(f"input of kind {config.kind!r} must be one array of numbers for a student")
        early = config.kind == "tensor" and made.nbytes <= stored.nbytes
        return cls(config, make, made.shape[1:], made.dtype, early)

    def view(self, table: pa.Table) -> Array:
        """Make the input of a table's rows, without a copy where they are stored as they are needed."""
        batches = table.combine_chunks().to_batches()
        if len(batches) == 1:
            return self.made(batches[0])
        out = np.empty((table.num_rows, *self.shape), self.dtype)
        self.fill(out, table)
        return out

    def fill(self, out: Array, table: pa.Table) -> None:
        """Make the input of a table's rows.

        Raises:
          InputError: a row's input has another shape than the first row's.
        """
        start = 0
        for batch in table.combine_chunks().to_batches():
            made = self.made(batch)
            out[start : start + len(made)] = made
            start += len(made)

    def made(self, batch: pa.RecordBatch) -> Array:
        """Make the input of a batch.

        Raises:
          InputError: none can be made, or its rows have another shape than the first row.
        """
        made: Array = self.make(batch)
        if made.shape[1:] != self.shape:
            raise InputError(
                f"inputs of all rows must have the shape {list(self.shape)} of the first, got {list(made.shape[1:])}"
            )
        return made
