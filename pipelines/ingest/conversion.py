"""Values to typed Arrow columns; a value that does not fit is told apart from a missing one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.pipelines.ingest.columns import ColumnType, arrow_field

Bools = npt.NDArray[np.bool_]


def convert(values: Sequence[Any], type_: ColumnType) -> tuple[pa.Array, Bools]:
    """Convert a column.

    Args:
      values: n values.
      type_: the type wanted.

    Returns:
      The column, null where a value is missing or does not fit, and where it does not fit (bool [n]).
    """
    values = [None if _is_missing(value, type_) else value for value in values]
    fitting = _FITTING[type_.kind]
    kept = [None if value is None else fitting(value, type_) for value in values]
    wrong = np.array([a is None and b is not None for a, b in zip(kept, values, strict=True)], bool)
    if type_.kind == "vector":
        storage = arrow_field("", type_).type
        return pa.array([None if v is None else v.astype(type_.dtype).tobytes() for v in kept], storage), wrong
    return pa.array(kept, arrow_field("", type_).type), wrong


def nested_vectors(lists: pa.Array, type_: ColumnType) -> pa.Array:
    """Pack lists of numbers, nested where the vector has several axes, into a vector column; null lists stay null."""
    flat = lists
    while pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type):
        flat = flat.flatten()
    present = lists.is_valid().to_numpy(zero_copy_only=False)
    matrix = np.zeros((len(lists), math.prod(type_.shape)), np.dtype(type_.dtype).newbyteorder("<"))
    matrix[present] = flat.to_numpy(zero_copy_only=False).reshape(-1, matrix.shape[1])
    bits = pa.array(present).buffers()[1]
    return pa.Array.from_buffers(arrow_field("", type_).type, len(lists), [bits, pa.py_buffer(matrix)])


def _is_missing(value: Any, type_: ColumnType) -> bool:
    """Tell whether a value stands for none: not a number, or a feature without a number where others have one."""
    if isinstance(value, np.ndarray):
        return value.size == 0 and type_.kind in ("int64", "float64")
    return isinstance(value, float) and math.isnan(value)


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.ndarray) and value.shape == (1,) else value


def _int(value: Any, _: ColumnType) -> int | None:
    value = _scalar(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63 else None


def _float(value: Any, _: ColumnType) -> float | None:
    value = _scalar(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _bool(value: Any, _: ColumnType) -> bool | None:
    return value if isinstance(value, bool) else None


def _string(value: Any, _: ColumnType) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    return json.dumps(value.tolist() if isinstance(value, np.ndarray) else value, ensure_ascii=False, default=str)


def _binary(value: Any, _: ColumnType) -> bytes | None:
    return value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else None


def _vector(value: Any, type_: ColumnType) -> Any:
    return value if isinstance(value, np.ndarray) and value.shape == type_.shape else None


def _list(value: Any, type_: ColumnType) -> Any:
    return value.astype(type_.dtype) if isinstance(value, np.ndarray) and value.ndim == 1 else None


_FITTING: dict[str, Callable[[Any, ColumnType], Any]] = {
    "int64": _int,
    "float64": _float,
    "bool": _bool,
    "string": _string,
    "binary": _binary,
    "vector": _vector,
    "list": _list,
}
