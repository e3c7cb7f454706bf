"""Values to typed Arrow columns; a value that does not fit is told apart from a missing one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from distilbeam.pipelines.ingest.columns import MISSING, ColumnType, arrow_field
from distilbeam.pipelines.ingest.records import Values

Bools = npt.NDArray[np.bool_]


def convert(values: Values, type_: ColumnType) -> tuple[pa.Array, Bools]:
    """Convert a column.

    Args:
      values: n values; see `records.Records`.
      type_: the type wanted.

    Returns:
      The column, null where a value is missing or does not fit, and where it does not fit (bool [n]).
    """
    if isinstance(values, list):
        return _convert_values(values, type_)
    return _convert_text(values, type_)


def stack_numbers(columns: list[pa.Array], dtype: str) -> tuple[npt.NDArray[Any], Bools]:
    """Put columns of numbers as text side by side.

    Returns:
      [n, columns] numbers, and in which rows one is missing or no number (bool [n]).
    """
    parts = [_convert_text(column, ColumnType("float64"))[0] for column in columns]
    missing = np.zeros(len(parts[0]), bool)
    matrix = np.zeros((len(parts[0]), len(parts)), dtype)
    for j, part in enumerate(parts):
        absent = part.is_null().to_numpy(zero_copy_only=False)
        missing |= absent
        matrix[:, j] = part.fill_null(0).to_numpy()
    return matrix, missing


def vector_array(matrix: npt.NDArray[Any], type_: ColumnType) -> pa.Array:
    """View numbers [n, width] as an Arrow column of a vector type."""
    storage = arrow_field("", type_).type
    data = np.ascontiguousarray(matrix.astype(np.dtype(type_.dtype).newbyteorder("<"), copy=False))
    return pa.FixedSizeBinaryArray.from_buffers(storage, len(matrix), [None, pa.py_buffer(data)])


def _convert_text(values: pa.Array, type_: ColumnType) -> tuple[pa.Array, Bools]:
    target = arrow_field("", type_).type
    if type_.kind in ("string", "binary"):
        text = pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)
        return text.cast(target), np.zeros(len(values), bool)
    if type_.kind != "bool":
        try:
            numbers = values.cast(target)
        except pa.ArrowInvalid:
            pass  # one of them is none: look at each
        else:
            if not pc.any(pc.is_nan(numbers)).as_py():
                return numbers, np.zeros(len(values), bool)
    texts = values.to_pylist()
    read = _READING[type_.kind]
    kept = [None if text in MISSING else read(text) for text in texts]
    wrong = np.array([a is None and b not in MISSING for a, b in zip(kept, texts, strict=True)], bool)
    return pa.array(kept, target), wrong


def _read_int(text: str) -> int | None:
    number = int(text) if re.fullmatch(r"[+-]?\d{1,19}", text) else None
    return number if number is not None and -(2**63) <= number < 2**63 else None


def _read_float(text: str) -> float | None:
    numeric = re.fullmatch(r"[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?|inf|Infinity)", text)
    return float(text) if numeric else None


def _read_bool(text: str) -> bool | None:
    return {"true": True, "false": False}.get(text.lower())


_READING: dict[str, Callable[[str], Any]] = {"int64": _read_int, "float64": _read_float, "bool": _read_bool}


def _convert_values(values: list[Any], type_: ColumnType) -> tuple[pa.Array, Bools]:
    values = [None if isinstance(value, float) and math.isnan(value) else value for value in values]
    fitting = _FITTING[type_.kind]
    kept = [None if value is None else fitting(value, type_) for value in values]
    wrong = np.array([a is None and b is not None for a, b in zip(kept, values, strict=True)], bool)
    if type_.kind == "vector":
        storage = arrow_field("", type_).type
        return pa.array([None if v is None else v.astype(type_.dtype).tobytes() for v in kept], storage), wrong
    return pa.array(kept, arrow_field("", type_).type), wrong


def _int(value: Any, _: ColumnType) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63 else None


def _float(value: Any, _: ColumnType) -> float | None:
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


def _list(value: Any, _: ColumnType) -> Any:
    return value.astype(np.float32) if isinstance(value, np.ndarray) and value.ndim == 1 else None


_FITTING: dict[str, Callable[[Any, ColumnType], Any]] = {
    "int64": _int,
    "float64": _float,
    "bool": _bool,
    "string": _string,
    "binary": _binary,
    "vector": _vector,
    "list": _list,
}
