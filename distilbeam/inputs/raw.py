"""Text and bytes sent as they are, for models that decode them themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.columns import is_bytes, is_text, plain, require_values
from distilbeam.inputs.config import InputConfig, InputError, require_columns


@dataclass(frozen=True)
class RawInput:
    """Gives a column of text or bytes as `bytes` objects."""

    config: InputConfig

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[Any]:
        """Read a batch to objects [n]; see `make_input`."""
        require_columns(batch, self.config.columns)
        name = self.config.columns[0]
        column = plain(batch.column(name))
        if is_text(column.type):
            column = column.cast(pa.large_binary())
        if not (is_bytes(column.type) or pa.types.is_fixed_size_binary(column.type)):
            raise InputError(f"column {name} must hold text or bytes, got {column.type}")
        require_values(column, name)
        values = np.empty(len(column), object)
        values[:] = column.to_pylist()
        return values
