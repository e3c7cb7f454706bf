"""Input made by the user's own function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.config import InputConfig, InputError, load_object, require_columns


@dataclass
class FunctionInput:
    """Calls `module:function` with the batch of the configured columns."""

    config: InputConfig
    _function: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.config.function is not None
        self._function = load_object(self.config.function, "input.function")

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[Any] | dict[str, npt.NDArray[Any]]:
        """Make the input of a batch; see `make_input`."""
        require_columns(batch, self.config.columns)
        made = self._function(batch.select(list(self.config.columns)))
        if isinstance(made, Mapping):
            return {name: self._checked(values, len(batch)) for name, values in made.items()}
        return self._checked(made, len(batch))

    def _checked(self, values: Any, rows: int) -> npt.NDArray[Any]:
        array = np.ascontiguousarray(values)
        if array.ndim == 0 or len(array) != rows:
            raise InputError(
                f"{self.config.function} must return arrays of {rows:,} rows, got shape {list(array.shape)}"
            )
        return array
