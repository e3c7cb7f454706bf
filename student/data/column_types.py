"""Tensor columns: the Arrow columns that are tensors, and viewing them as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.teacher.softlabels.columns import dtype_of

Array = npt.NDArray[Any]
# torch has few operations on these
WIDER = {np.dtype(name): np.dtype(np.int64) for name in ("uint16", "uint32", "uint64")}


def is_number(kind: pa.DataType) -> bool:
    """Tell whether a column of this type is a tensor of one number per row."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def is_carried_tensor(field: pa.Field) -> bool:
    """Tell whether a column holds lists of numbers of one length that are no labels."""
    lists = pa.types.is_fixed_size_list(field.type) and is_number(field.type.value_type)
    return bool(lists and not field.name.startswith("teacher_"))


def common_fields(schemas: Sequence[pa.Schema]) -> list[pa.Field]:
    """List the columns that all schemas have; numbers of different types have one that holds them all.

    Raises:
      ValueError: the types of a column of numbers do not go together.
    """
    names = set.intersection(*(set(schema.names) for schema in schemas))
    return [
        _common_field([schema.field(field.name) for schema in schemas]) for field in schemas[0] if field.name in names
    ]


def numbers(column: pa.ChunkedArray, field: pa.Field) -> Array:
    """View a column as an array [n] of a field's type; missing values are NaN.

    Raises:
      ValueError: whole numbers are missing.
    """
    if column.null_count and pa.types.is_integer(field.type):
        raise ValueError(
            f"column {field.name} of whole numbers must not have missing values, got {column.null_count:,}; name the "
            "columns that you need in `columns`"
        )
    return _as_tensors_hold(_joined(column).to_numpy(zero_copy_only=False), field.type)


def lists(column: pa.ChunkedArray, field: pa.Field) -> Array:
    """View a column of lists as an array [n, length] of a field's type.

    Raises:
      ValueError: a value is missing.
    """
    joined, width = _joined(column), field.type.list_size
    values = joined.flatten()
    if joined.null_count or values.null_count or len(values) != len(joined) * width:
        raise ValueError(f"column {field.name} must not have missing values in its lists; fill them before labelling")
    return _as_tensors_hold(values.to_numpy(zero_copy_only=False).reshape(len(joined), width), field.type.value_type)


def _common_field(fields: Sequence[pa.Field]) -> pa.Field:
    first = fields[0]
    different = any(field.type != first.type for field in fields)
    if not (different and all(is_number(field.type) or is_carried_tensor(field) for field in fields)):
        return first
    try:
        common = pa.unify_schemas([pa.schema([field]) for field in fields], promote_options="permissive").field(0)
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        common = None
    if common is None or not (is_number(common.type) or is_carried_tensor(common)):
        kinds = " and ".join(sorted({str(field.type) for field in fields}))
        raise ValueError(f"column {first.name} must have types that go together in all shards, got {kinds}")
    return common


def _as_tensors_hold(array: Array, type_: pa.DataType) -> Array:
    dtype = dtype_of(type_)
    return array.astype(WIDER.get(dtype, dtype), copy=False)


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """Join the chunks of a column; one chunk is not copied."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
