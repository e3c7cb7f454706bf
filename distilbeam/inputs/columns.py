"""Columns whatever way Arrow stores their values: by number in a dictionary, in runs, as views, under an extension type."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distilbeam.inputs.config import InputError


def plain(column: pa.Array) -> pa.Array:
    """Store a column's values one after the other, in the type that they have.

    A column that pandas calls a category is stored as a dictionary, for instance; what it means is the text.

    Args:
      column: of any type.

    Returns:
      The values: of no dictionary, run-end, view or extension type. Values in lists and structs stay as they are.
    """
    while True:
        type_ = column.type
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        elif pa.types.is_dictionary(type_):
            column = column.dictionary_decode()
        elif pa.types.is_run_end_encoded(type_):
            column = pc.run_end_decode(column)
        elif pa.types.is_string_view(type_):
            column = column.cast(pa.large_string())
        elif pa.types.is_binary_view(type_):
            column = column.cast(pa.large_binary())
        elif pa.types.is_list_view(type_) or pa.types.is_large_list_view(type_):
            # Arrow's own cast reads wrong values of a slice (25.0.1)
            column = pa.array(column.to_pylist(), pa.large_list(type_.value_type))
        else:
            return column


def without_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Store the values of dictionary-encoded columns one after the other.

    Each file has a dictionary of its own, and many of them need not fit into one of the same index type.

    Args:
      batch: of any columns.

    Returns:
      The same rows; the batch itself where no column has a dictionary.
    """
    if not any(pa.types.is_dictionary(field.type) for field in batch.schema):
        return batch
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column for column in batch.columns
    ]
    fields = [field.with_type(column.type) for field, column in zip(batch.schema, columns, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def is_list(type_: pa.DataType) -> bool:
    """Tell whether values of a plain type are lists."""
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def is_text(type_: pa.DataType) -> bool:
    """Tell whether values of a plain type are text."""
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_))


def is_bytes(type_: pa.DataType) -> bool:
    """Tell whether values of a plain type are bytes of any length."""
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def require_values(column: pa.Array, name: str) -> None:
    """Check that every row has a value.

    Raises:
      InputError: a value is missing.
    """
    if column.null_count:
        raise InputError(f"column {name} must not have missing values, got {column.null_count:,}")


def flattened(column: pa.Array, name: str) -> pa.Array:
    """Return the values of lists one after the other.

    Args:
      column: lists of a plain type.
      name: of the column, for the message.

    Raises:
      InputError: a list, or a value of one, is missing.
    """
    require_values(column, name)
    values: Any = plain(column.flatten())
    require_values(values, name)
    return values
