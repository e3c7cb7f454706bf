"""Numbers in columns: raw bytes, lists of one length, or one column per feature."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.columns import flattened, is_bytes, is_list, plain, require_values
from distilbeam.inputs.config import InputConfig, InputError, normalised, require_columns

WHOLE = 2**53  # whole numbers up to here are exact in float64; larger ones are ids and hashes, which no model reads


@dataclass(frozen=True)
class TensorInput:
    """Reads columns of numbers side by side."""

    config: InputConfig

    def __call__(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Read a batch; see `make_input`."""
        require_columns(batch, self.config.columns)
        parts = [_matrix(batch.column(name), batch.schema.field(name), self.config) for name in self.config.columns]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        shape = self._shape(batch.schema)
        width = values.shape[1]
        if shape is not None and math.prod(shape) != width and len(batch):
            raise InputError(
                f"an example of shape {list(shape)} has {math.prod(shape):,} numbers, column "
                f"{', '.join(self.config.columns)} holds {width:,}"
            )
        values = normalised(values, self.config, 1.0, "feature", width) if len(batch) else values.astype(np.float32)
        return np.ascontiguousarray(values).reshape(len(batch), *(shape or (width,)))

    def _shape(self, schema: pa.Schema) -> tuple[int, ...] | None:
        if self.config.shape is not None or len(self.config.columns) > 1:
            return self.config.shape
        field = schema.field(self.config.columns[0])
        text = (field.metadata or {}).get(b"shape")
        if text is not None:
            return tuple(json.loads(text))
        return _nested_shape(field.type)


def _nested_shape(type_: pa.DataType) -> tuple[int, ...] | None:
    if isinstance(type_, pa.FixedShapeTensorType):
        return tuple(type_.shape)
    sizes = []
    while pa.types.is_fixed_size_list(type_):
        sizes.append(type_.list_size)
        type_ = type_.value_type
    return tuple(sizes) or None


def _matrix(column: pa.Array, field: pa.Field, config: InputConfig) -> npt.NDArray[Any]:
    """View or copy a column as an array [n, width]."""
    column = plain(column)
    require_values(column, field.name)
    if pa.types.is_fixed_size_binary(column.type) or is_bytes(column.type):
        return _from_bytes(column, field, config)
    if is_list(column.type):
        return _from_lists(column, field.name)
    return _numbers(column, field.name)[:, None]


def _from_bytes(column: pa.Array, field: pa.Field, config: InputConfig) -> npt.NDArray[Any]:
    name = (field.metadata or {}).get(b"dtype", config.dtype.encode()).decode()
    dtype = np.dtype(name).newbyteorder("<")
    start, width = _byte_range(column, field.name)
    if width % dtype.itemsize:
        raise InputError(f"column {field.name} must hold whole {name} numbers, got {width:,} bytes in an example")
    if not len(column) or not width:
        return np.empty((len(column), width // dtype.itemsize), dtype)
    data = column.buffers()[-1]
    count = len(column) * width // dtype.itemsize
    return np.frombuffer(data, dtype, count, offset=start).reshape(len(column), -1)


def _byte_range(column: pa.Array, name: str) -> tuple[int, int]:
    """Return where a column's bytes start and how many each row has."""
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        return column.offset * width, width
    offset_type = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    offsets = np.frombuffer(column.buffers()[1], offset_type, len(column) + 1, column.offset * offset_type().itemsize)
    return int(offsets[0]), _common(np.diff(offsets), name, "bytes")


def _from_lists(column: pa.Array, name: str) -> npt.NDArray[Any]:
    rows = len(column)
    while is_list(column.type):
        if not pa.types.is_fixed_size_list(column.type):
            _common(np.diff(column.offsets.to_numpy()), name, "numbers")
        column = flattened(column, name)
    width = len(column) // rows if rows else 0
    return _numbers(column, name, width).reshape(rows, width)


def _common(lengths: npt.NDArray[Any], name: str, what: str) -> int:
    if not len(lengths):
        return 0
    if (lengths != lengths[0]).any():
        row = int(np.flatnonzero(lengths != lengths[0])[0])
        raise InputError(
            f"column {name} must have as many {what} in every row: row 0 has {lengths[0]:,}, row {row:,} {lengths[row]:,}"
        )
    return int(lengths[0])


def _numbers(column: pa.Array, name: str, width: int = 1) -> npt.NDArray[Any]:
    """Read numbers, `width` of them in a row."""
    type_ = column.type
    if pa.types.is_null(type_) and not len(column):
        return np.empty(0, np.float32)
    if pa.types.is_decimal(type_):
        column = column.cast(pa.float64())
    elif not (pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_)):
        raise InputError(
            f"column {name} must hold numbers, lists of numbers or bytes, got {type_}; make numbers of it, or read it with "
            "an input of kind 'function'"
        )
    values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind in "iu" and values.itemsize == 8:
        _require_exact(values, name, width)
    return values


def _require_exact(values: npt.NDArray[Any], name: str, width: int) -> None:
    if not len(values) or -WHOLE <= values.min() <= values.max() <= WHOLE:
        return
    place = int(np.flatnonzero((values > WHOLE) | (values < -WHOLE))[0])
    raise InputError(
        f"column {name} must hold numbers, row {place // width:,} has {values[place]}: a whole number beyond 2^53 is an id or "
        "a hash, of which a model sees a rounded one; leave the column out, or read it with an input of kind 'function'"
    )
