"""Values of JSON and of CSV as the Arrow columns that a student reads; a value of another kind is its row's own mistake."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from distilbeam.inputs.config import InputConfig

MISTAKES = (pa.ArrowException, TypeError, ValueError, OverflowError)
HOLDS = {
    "jsonl": ("tensor", "text", "tokens", "raw", "function"),
    "csv": ("tensor", "text"),
    "text": ("text",),
    "images": ("image",),
}
_NAMES = {"jsonl": "JSON lines", "csv": "CSV", "text": "lines of text", "images": "image files"}

Column = tuple[pa.Array, dict[int, str]]


def require_holds(format_: str, config: InputConfig) -> None:
    """Check that a format can hold what a student reads.

    Raises:
      ValueError: it cannot.
    """
    if format_ in HOLDS and config.kind not in HOLDS[format_]:
        raise ValueError(
            f"{_NAMES[format_]} cannot hold what the student reads, {config.kind} input of column {', '.join(config.columns)}; "
            f"give Parquet{' or image files' if config.kind == 'image' else ''}"
        )


def from_json(values: Sequence[Any], name: str, config: InputConfig) -> Column:
    """Make a column of JSON values [n]; return it with the reasons by row why some of its values are null."""
    type_ = {"text": pa.string(), "raw": pa.string(), "tokens": pa.list_(pa.int64())}.get(config.kind)
    try:
        return pa.array(values, type_), {}  # numbers and lists of them: Arrow finds out, `distilbeam.inputs` reads all
    except MISTAKES:
        return _one_by_one(values, name, type_ or _numbers_like(values), lambda value: value)


def from_csv(values: Sequence[str | None], name: str, config: InputConfig, numbers: int) -> Column:
    """Make a column of the fields [n] of a CSV file, as `from_json`; `numbers` is how many of them make an example.

    An empty field is a missing number. A vector in one field is written as in JSON, `[0.5, 1]`.
    """
    if config.kind == "text":
        return from_json(values, name, config)
    if len(config.columns) == 1 and numbers > 1:
        return _one_by_one(values, name, pa.list_(pa.float64()), lambda text: json.loads(text) if text else None)
    texts = [value or None for value in values]
    try:
        return pc.cast(pa.array(texts, pa.string()), pa.float64()), {}
    except MISTAKES:
        return _one_by_one(texts, name, pa.float64(), float)


def _one_by_one(values: Sequence[Any], name: str, type_: pa.DataType, read: Callable[[Any], Any]) -> Column:
    kept: list[Any] = []
    reasons: dict[int, str] = {}
    for row, value in enumerate(values):
        try:
            kept.append(None if value is None else pa.scalar(read(value), type_).as_py())
        except MISTAKES:
            kept.append(None)
            reasons[row] = f"column {name} must hold values of type {type_}, it has {_short(value)}"
    return pa.array(kept, type_), reasons


def _numbers_like(values: Sequence[Any]) -> pa.DataType:
    """The type of float64 numbers, or lists of them as deep as the first value has."""
    first = next((value for value in values if isinstance(value, list | int | float)), 0.0)
    type_ = pa.float64()
    while isinstance(first, list):
        type_, first = pa.list_(type_), first[0] if first else 0.0
    return type_


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
