"""Input made by the user's own function."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.teacher.preprocess import InputConfig, InputError, load_object, require_columns


@dataclass
class FunctionInput:
    """Calls `module:function` with the batch of the configured columns."""

    config: InputConfig
    _function: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.config.function is not None
        self._function = load_object(self.config.function, "input.function")

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[Any]:
        """Make the input of a batch; see `make_input`."""
        require_columns(batch, self.config.columns)
        values = np.ascontiguousarray(self._function(batch.select(list(self.config.columns))))
        if values.ndim == 0 or len(values) != len(batch):
            raise InputError(
                f"{self.config.function} must return an array of {len(batch):,} rows, got shape {list(values.shape)}"
            )
        return values
