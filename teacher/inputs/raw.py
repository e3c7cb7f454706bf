"""Text and bytes sent as they are, for models that decode them themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.teacher.preprocess import InputConfig, InputError, require_columns


@dataclass(frozen=True)
class RawInput:
    """Gives a column of text or bytes as `bytes` objects."""

    config: InputConfig

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[Any]:
        """Read a batch to objects [n]; see `make_input`."""
        require_columns(batch, self.config.columns)
        name = self.config.columns[0]
        column = batch.column(name)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = column.cast(pa.large_binary())
        if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
            raise InputError(f"column {name} must hold text or bytes, got {column.type}")
        if column.null_count:
            raise InputError(f"column {name} must not have missing values, got {column.null_count:,}")
        values = np.empty(len(column), object)
        values[:] = column.to_pylist()
        return values
