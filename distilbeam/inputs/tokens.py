"""Lists of token ids of any length as one array, without a step of Python per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.columns import flattened, is_list, plain
from distilbeam.inputs.config import InputConfig, InputError, require_columns


@dataclass(frozen=True)
class ListInput:
    """Reads a column of lists of ids as int64 [n, max_length]."""

    config: InputConfig

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
        """Cut and pad a batch; see `make_input`."""
        require_columns(batch, self.config.columns)
        name = self.config.columns[0]
        column = batch.column(name)
        ids, offsets = _ids(column, name)
        vocabulary = self.config.vocabulary
        assert vocabulary is not None
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
            wrong = ids.max() if ids.min() >= 0 else ids.min()
            raise InputError(f"column {name} must hold ids from 0 to {vocabulary - 1:,}, got {wrong:,}")
        return padded(ids, offsets, self.config.max_length, self.config.pad_id or 0)


def padded(ids: npt.NDArray[Any], offsets: npt.NDArray[Any], length: int, pad_id: int) -> npt.NDArray[np.int64]:
    """Cut rows of ids to one length and fill what is missing.

    Args:
      ids: integers, the ids of all rows one after another.
      offsets: integers [n + 1], where each row's ids begin, and where the last row's end.
      length: ids of a row of the result.
      pad_id: what fills a shorter row.

    Returns:
      int64 [n, length].
    """
    kept = np.minimum(np.diff(offsets), length)
    filled = np.arange(length) < kept[:, None]
    out = np.full(filled.shape, pad_id, np.int64)
    starts = np.repeat(offsets[:-1], kept)
    within = np.arange(len(starts)) - np.repeat(np.cumsum(kept) - kept, kept)
    out[filled] = ids[starts + within]
    return out


def _ids(column: pa.Array, name: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    column = plain(column)
    if not is_list(column.type):
        raise InputError(f"column {name} must hold lists of token ids, got {column.type}")
    values = flattened(column, name)
    if not (pa.types.is_integer(values.type) or (pa.types.is_null(values.type) and not len(values))):
        raise InputError(f"column {name} must hold lists of token ids, got {column.type}")
    if pa.types.is_fixed_size_list(column.type):
        offsets = np.arange(len(column) + 1, dtype=np.int64) * column.type.list_size
    else:
        offsets = column.offsets.to_numpy().astype(np.int64)
    return values.to_numpy(zero_copy_only=False), offsets - offsets[0]
