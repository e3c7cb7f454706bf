"""Ids for rows that have none: the hash of what is in them.

Equal content has one id on every machine and in every file, which is what makes a label found again. Cost: about 1 µs a
row for columns of fixed width (one BLAKE2b hash), 2 µs with strings or bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ID_BYTES = 16
_MISSING = b"\xff" * 8  # where a value's length stands; no value is that long
_SAME = (
    (lambda kind: pa.types.is_large_string(kind) or pa.types.is_string_view(kind), pa.string()),
    (lambda kind: pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind), pa.binary()),
)


def content_ids(rows: pa.Table) -> list[bytes]:
    """Hash each row.

    The id depends on the row's values alone: not on its neighbours, the order of the columns, chunks, nor on how the values
    are encoded (dictionaries, large or view types). All NaN are one value; a missing value is one of its own.

    Args:
      rows: the columns whose content makes a row what it is; names and types count as content.

    Returns:
      One BLAKE2b hash of 16 bytes per row.
    """
    named = sorted(zip(rows.column_names, rows.columns, strict=True), key=lambda column: column[0])
    plain = [(name, plain_encoding(column)) for name, column in named]
    kind = hashlib.blake2b("\n".join(f"{name}:{type_name(c.type)}" for name, c in plain).encode(), digest_size=ID_BYTES)
    columns = [cells(column) for _, column in plain]
    return [_hash(kind, row) for row in zip(*columns, strict=True)] if columns else [kind.digest()] * rows.num_rows


def plain_encoding(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return a column as one array without dictionaries, extension types, large or view types at its outermost level."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [_empty(column.type)])
    if isinstance(column, pa.ExtensionArray):
        return plain_encoding(column.storage)
    if pa.types.is_dictionary(column.type):
        return plain_encoding(column.dictionary_decode())
    for is_kind, target in _SAME:
        if is_kind(column.type) and column.type != target:
            return _cast_long(column, target)
    if pa.types.is_large_list(column.type) or pa.types.is_list_view(column.type):
        return column.cast(pa.list_(column.type.value_type))
    return column


def cells(column: pa.Array) -> list[bytes | None]:
    """Give the bytes of each value of a column in its plain encoding, None for a missing one."""
    if not column.null_count:
        return list(_cells(column))
    present = iter(_cells(column.drop_null()))
    return [next(present) if valid else None for valid in column.is_valid().to_pylist()]


def _hash(kind: hashlib.blake2b, row: Iterable[bytes | None]) -> bytes:
    state = kind.copy()
    for cell in row:
        if cell is None:
            state.update(_MISSING)
        else:
            state.update(len(cell).to_bytes(8, "little"))
            state.update(cell)
    return state.digest()


def _cells(column: pa.Array) -> Sequence[bytes]:
    """Give the bytes of each value; none is missing, but items of lists may be."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind) and pa.types.is_primitive(kind.value_type):
        return _vectors(column)
    if pa.types.is_fixed_size_binary(kind):
        return _as_bytes(column.cast(pa.binary()))
    if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _as_bytes(column.cast(pa.large_binary()))
    if pa.types.is_primitive(kind):
        values = _numbers(column)
        if values.dtype != object:
            return _fixed_width(values, len(column))
    return [repr(value).encode() for value in column.to_pylist()]


def _vectors(column: pa.Array) -> Sequence[bytes]:
    """Give the bytes of vectors; one with missing items has zeros there, and its mask of items behind."""
    items = column.flatten()
    values = _numbers(items)
    if values.dtype == object:
        return [repr(value).encode() for value in column.to_pylist()]
    found = _fixed_width(values, len(column))
    if items.null_count:
        mask = items.is_valid().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        for row in np.flatnonzero(~mask.all(axis=1)).tolist():
            found[row] += mask[row].tobytes()
    return found


def _numbers(column: pa.Array) -> np.ndarray[Any, Any]:
    """Return numbers as numpy has them, 0 for missing ones, the same NaN for all."""
    if pa.types.is_time(column.type):  # numpy has no type for them
        column = column.view(pa.int32() if pa.types.is_time32(column.type) else pa.int64())
    if column.null_count:
        column = pc.if_else(column.is_valid(), column, _zero(column.type))
    values: np.ndarray[Any, Any] = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind == "f" and (unknown := np.isnan(values)).any():
        values = np.where(unknown, values.dtype.type(np.nan), values)
    return values


def _zero(kind: pa.DataType) -> pa.Scalar:
    width = kind.bit_width // 8
    return pa.scalar(False) if width == 0 else pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(bytes(width))])[0]


def _fixed_width(values: np.ndarray[Any, Any], rows: int) -> list[bytes]:
    data = np.ascontiguousarray(values).view(np.uint8).reshape(rows, -1) if rows else np.empty((0, 0), np.uint8)
    return [row.tobytes() for row in data]


def _as_bytes(column: pa.Array) -> list[bytes]:
    values: list[bytes] = column.to_pylist()
    return values


def _cast_long(column: pa.Array, target: pa.DataType) -> pa.Array:
    """Cast to a type with short offsets, or keep the long ones where there are too many bytes for them."""
    try:
        return column.cast(target)
    except pa.ArrowInvalid:
        return column


def type_name(kind: pa.DataType) -> str:
    """Write a type as content ids have it: strings and bytes of any length, items of lists under one name."""
    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return "string" if pa.types.is_large_string(kind) else "binary"
    if pa.types.is_fixed_size_list(kind):
        return f"fixed_size_list<element: {type_name(kind.value_type)}>[{kind.list_size}]"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list<element: {type_name(kind.value_type)}>"
    return str(kind)


def _empty(kind: pa.DataType) -> pa.Array:
    return pa.array([], kind)
