"""Columns of a soft-label shard: Arrow types, and the Parquet encodings that make them small.

Values of log-probabilities rounded to half precision leave the low 13 bits of a float32 at zero. BYTE_STREAM_SPLIT puts
equal byte positions beside each other and zstd removes the empty ones, so that a float32 column takes less of the disk than
one of float16, whose bytes DuckDB does not read split (64 of 1,000 classes: 79 and 97 bytes a row); the high bytes of class
numbers vanish in the same way. Dictionaries are kept off
floats, where they cost time and save nothing, but for the frequencies of sampled labels: those have at most as many
values as there were draws, so that a dictionary holds them exactly in fewer bytes than half precision would need.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from distilbeam.inputs.blocks import INPUT_IDS
from distilbeam.teacher.softlabels.spec import SoftLabelSpec

LOGPROBS, CLASSES, TAIL, MARGIN = "teacher_logprobs", "teacher_classes", "teacher_tail_logmass", "teacher_margin"
TOKEN_LOGPROB, POSITIONS = "teacher_token_logprob", "label_positions"  # of blocks of tokens
SPEC_KEY = b"distilbeam.softlabels"
WEIGHTS = ("alpha", "candidates", "weight")  # how far to trust a label
# what a shard holds beside what is carried, and all that begins with the prefix
RESERVED = ("example_id", "pool_row", "gain", "inclusion_probability", POSITIONS, *WEIGHTS)
RESERVED_PREFIX = "teacher_"


def label_schema(spec: SoftLabelSpec) -> pa.Schema:
    """Return the schema of what `encode` makes, with the specification in its metadata.

    Args:
      spec: the form of the labels, which decides the columns and their types.

    Returns:
      The schema of the columns whose names begin with `teacher_`, and `label_positions` where blocks of tokens name them.
    """
    return pa.schema(_fields_of(spec), metadata={SPEC_KEY: spec.to_json()})


def _fields_of(spec: SoftLabelSpec) -> list[pa.Field]:
    if spec.unit == "token":
        return _block_fields(spec)
    return _fields(spec.kind, spec.width, spec.storage)


@lru_cache(maxsize=64)
def _block_fields(spec: SoftLabelSpec) -> list[pa.Field]:
    def lists(name: str, kind: pa.DataType, width: int) -> pa.Field:
        return pa.field(name, pa.list_(pa.field("element", kind, nullable=False), width), nullable=False)

    labels = spec.labels_per_row
    value = pa.float32() if spec.storage == "float32" else pa.float16()
    fields = [lists(LOGPROBS, value, spec.width), lists(CLASSES, pa.int32(), spec.width)]
    fields += [lists(TAIL, pa.float32(), labels)] if spec.kind == "top_k" else []
    fields += [lists(TOKEN_LOGPROB, pa.float32(), labels)]
    return fields + ([lists(POSITIONS, pa.int32(), labels)] if spec.positions != "all" else [])


@lru_cache(maxsize=64)
def _fields(kind: str, width: int, storage: str) -> list[pa.Field]:
    value = pa.float32() if storage == "float32" else pa.float16()
    fields = [pa.field(LOGPROBS, pa.list_(pa.field("element", value, nullable=False), width), nullable=False)]
    if kind != "dense":
        classes = pa.list_(pa.field("element", pa.int32(), nullable=False), width)
        fields.append(pa.field(CLASSES, classes, nullable=False))
    if kind == "top_k":
        fields.append(pa.field(TAIL, pa.float32(), nullable=False))
    return [*fields, pa.field(MARGIN, pa.float32(), nullable=False)]


def check_columns(schema: pa.Schema, spec: SoftLabelSpec, *, margin: bool = True) -> None:
    """Check that a schema has the label columns of a specification.

    Columns beyond those of the specification are welcome: newer minor versions add some.

    Args:
      schema: of a shard, label columns and carried ones.
      spec: the form of the labels, which decides the columns and their types.
      margin: whether `teacher_margin`, which the distribution does not need, must be there.

    Raises:
      ValueError: a column is missing or of another type.
    """
    for field in _fields_of(spec):
        if field.name == MARGIN and not margin:
            continue
        if field.name not in schema.names:
            raise ValueError(f"soft labels must have a column {field.name}; the columns are {', '.join(schema.names)}")
        if not _same_type(schema.field(field.name).type, field.type):
            raise ValueError(
                f"column {field.name} must be {field.type} for {spec.kind} labels, got {schema.field(field.name).type}"
            )


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Choose encodings for `pyarrow.parquet.ParquetWriter`.

    Args:
      schema: schema of a shard.

    Returns:
      Keyword arguments.
    """
    leaves = dict(leaf for field in schema for leaf in _leaves(field.name, field.type))
    encodings = {path: encoding for path, type_ in leaves.items() if (encoding := _encoding(path, type_))}
    if TOKEN_LOGPROB in schema.names:  # the high bytes of ids vanish when they stand together
        encodings |= {path: "BYTE_STREAM_SPLIT" for path in leaves if path.startswith(f"{INPUT_IDS}.")}
    if CLASSES in schema.names and TAIL not in schema.names:  # sampled labels
        encodings = {path: encoding for path, encoding in encodings.items() if not path.startswith(f"{LOGPROBS}.")}
    return {
        "compression": "zstd",
        "use_dictionary": [path for path in leaves if path not in encodings and path != "example_id"],  # ids differ
        "column_encoding": encodings,
        "write_statistics": [
            path for path, type_ in leaves.items() if "." not in path and not pa.types.is_binary(type_)
        ],
        "store_schema": True,
        "write_page_checksum": True,
    }


def flat_values(column: pa.Array | pa.ChunkedArray, width: int) -> np.ndarray[Any, Any]:
    """View a fixed-size list column as an array without copying where it is one piece.

    Args:
      column: fixed-size lists, or the variable lists of one length that other tools make of them.
      width: values in each list.

    Returns:
      Array [n, width] of the column's type.

    Raises:
      ValueError: missing values or lists of another length.
    """
    if isinstance(column, pa.ChunkedArray):
        if column.num_chunks != 1:
            parts = [flat_values(chunk, width) for chunk in column.chunks]
            empty = np.empty((0, width), dtype_of(column.type.value_type))
            return np.concatenate(parts) if parts else empty
        column = column.chunk(0)
    values = _values(column, width)
    if column.null_count or values.null_count or len(values) != len(column) * width:
        raise ValueError(f"every row of a label column must have {width:,} values and none missing")
    array: np.ndarray[Any, Any] = values.to_numpy(zero_copy_only=True).reshape(-1, width)
    return array


def dtype_of(type_: pa.DataType) -> np.dtype[Any]:
    """Return the numpy type of an Arrow type of numbers; Arrow's own `to_pandas_dtype` needs pandas, which is no base dependency."""
    dtype: np.dtype[Any] = pa.array([], type_).to_numpy(zero_copy_only=False).dtype
    return dtype


def _values(column: pa.Array, width: int) -> pa.Array:
    """Return the values of all lists; `flatten` would also look for missing lists, which takes longer than everything else."""
    if pa.types.is_fixed_size_list(column.type) and column.type.list_size == width and not column.null_count:
        return column.values.slice(column.offset * width, len(column) * width)
    return column.flatten()


def _same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    if pa.types.is_fixed_size_list(expected):
        lists = pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)
        sized = not pa.types.is_fixed_size_list(found) or found.list_size == expected.list_size
        return bool(lists and sized and found.value_type == expected.value_type)
    return bool(found == expected)


def _leaves(path: str, type_: pa.DataType) -> list[tuple[str, pa.DataType]]:
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return _leaves(f"{path}.list.element", type_.value_type)
    if pa.types.is_struct(type_):
        return [leaf for field in type_ for leaf in _leaves(f"{path}.{field.name}", field.type)]
    return [(path, type_)]


def _encoding(path: str, type_: pa.DataType) -> str | None:
    if pa.types.is_float16(type_) or pa.types.is_fixed_size_binary(type_):
        return "PLAIN"  # DuckDB reads no half-precision numbers that are split
    return "BYTE_STREAM_SPLIT" if pa.types.is_floating(type_) or path.startswith(f"{CLASSES}.") else None
