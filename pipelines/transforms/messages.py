"""Messages as Arrow record batches of one schema.

A schema is written as `id:string,x:float32[64],pixels:uint8[8,8],n:int64`: names with their types; a type with a shape is a
vector, stored as the pools of `ingest` store them. What does not fit is refused with a reason, never cut or reshaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from apache_beam.metrics import Metrics

from distilbeam.pipelines.ingest.columns import ColumnType, arrow_field
from distilbeam.pipelines.ingest.conversion import convert

_COLUMN = re.compile(r"\s*([A-Za-z_]\w*)\s*:\s*(\w+)\s*(?:\[([\d,\s]+)\])?\s*")
_NUMBERS = ("float32", "uint8", "int32", "int64")
_SCALARS = ("string", "binary", "int64", "float64", "bool")
_AS_THEY_ARE = {"string": str, "int64": int, "bool": bool}  # Python's types that Arrow's hold without a look
_SHOWN = 80  # characters of a value, in a reason
_decoder: Any = json.JSONDecoder()
_read_json = _decoder.scan_once  # what `raw_decode` calls
_EXACT = 2**53  # whole numbers beyond it are not told apart by float64


def parse_schema(text: str) -> dict[str, ColumnType]:
    """Read a schema; see the module.

    Raises:
      ValueError: a column that is not `name:type` or `name:type[shape]`, or the same name twice.
    """
    columns: dict[str, ColumnType] = {}
    for part in re.split(r",(?![^\[]*\])", text):
        match = _COLUMN.fullmatch(part)
        if match is None:
            raise ValueError(f"--schema takes name:type or name:type[shape], separated by commas, got '{part}'")
        name, type_, shape = match.groups()
        allowed = _SCALARS if shape is None else _NUMBERS
        if type_ not in allowed:
            raise ValueError(f"--schema: the type of {name} must be one of {', '.join(allowed)}, got {type_}")
        if name in columns:
            raise ValueError(f"--schema must name each column once, got {name} twice")
        sizes = () if shape is None else tuple(int(size) for size in shape.split(","))
        columns[name] = ColumnType(type_) if shape is None else ColumnType("vector", type_, sizes)
    return columns


def parse_message(value: bytes | None) -> tuple[dict[str, Any] | None, str]:
    """Read a JSON object.

    Returns:
      The object and "", or None and why it is none.
    """
    if value is None:
        return None, "the message has no value (a tombstone)"
    try:
        # UTF-8 from its first letter on; json.loads spends half of its time on finding that out
        text = value.decode() if value[:1] == b"{" and value[1:2] != b"\0" else ""
        row, end = _read_json(text, 0)
        if end == len(text) and type(row) is dict:
            return row, ""
    except (ValueError, StopIteration, RecursionError):
        pass  # for json.loads to say
    try:
        row = json.loads(value)
    except RecursionError:
        return None, "not JSON that can be read: it is nested too deep"
    except ValueError as e:
        return None, f"not JSON: {e}"
    return (row, "") if isinstance(row, dict) else (None, f"must be a JSON object, got {type(row).__name__}")


def rows_to_batch(
    rows: Sequence[Mapping[str, Any]], schema: Mapping[str, ColumnType]
) -> tuple[pa.RecordBatch, dict[int, str]]:
    """Lay rows out as columns.

    Args:
      rows: n mappings from a column's name to its value.
      schema: the columns.

    Returns:
      A batch of the rows that fit, in their order, and why each of the others does not, by its number.
    """
    reasons: dict[int, str] = {}
    arrays = []
    for name, type_ in schema.items():
        values = [row.get(name) for row in rows]
        array = _column(values, type_)
        if array.null_count:
            for i in np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False)).tolist():
                reasons.setdefault(i, _reason(name, type_, values[i]))
        arrays.append(array)
    batch = pa.record_batch(arrays, schema=pa.schema([arrow_field(name, type_) for name, type_ in schema.items()]))
    if reasons:
        batch = batch.filter(pa.array([i not in reasons for i in range(len(rows))], pa.bool_()))
    return batch, reasons


def _column(values: list[Any], type_: ColumnType) -> pa.Array:
    if type_.kind == "vector":
        return _vectors(values, type_)
    try:
        if type_.kind in _AS_THEY_ARE and all(type(value) is _AS_THEY_ARE[type_.kind] for value in values):
            return pa.array(values, arrow_field("", type_).type)  # what nearly every batch is
        return convert(values, type_)[0]
    except (ValueError, OverflowError, RecursionError, pa.ArrowException):  # one value cannot be stored: find which
        if len(values) == 1:
            return pa.nulls(1, arrow_field("", type_).type)
        middle = len(values) // 2
        return pa.concat_arrays([_column(values[:middle], type_), _column(values[middle:], type_)])


def _vectors(values: list[Any], type_: ColumnType) -> pa.Array:
    """Pack lists of numbers; null where one has another shape or a number that the type cannot hold."""
    together = _numbers(values, type_, (len(values), *type_.shape)) if values else None
    storage = arrow_field("", type_).type
    if together is not None:
        return pa.Array.from_buffers(storage, len(values), [None, pa.py_buffer(np.ascontiguousarray(together))])
    # one of them does not fit: each by itself
    one = [_numbers(value, type_, type_.shape) if isinstance(value, list) else None for value in values]
    return pa.array([None if array is None else array.tobytes() for array in one], storage)


def _numbers(value: Any, type_: ColumnType, shape: tuple[int, ...]) -> npt.NDArray[Any] | None:
    try:
        array = np.array(value)
    except (ValueError, OverflowError, RecursionError):
        return None
    dtype = np.dtype(type_.dtype)
    if (
        array.dtype.kind == "O" and dtype.kind == "f"
    ):  # a whole number beyond 64 bits, which a float holds beside floats too
        array = _floats(array)
    # what is asked of a row must not depend on the rows beside it, which decide the type of them all
    if array.shape != shape or array.dtype.kind not in "ifub":
        return None
    if dtype.kind != "f" and array.dtype.kind == "f" and not (np.abs(array) < _EXACT).all():
        return None  # a fraction beside it made a float of a whole number that a float may round
    with np.errstate(over="ignore", invalid="ignore"):
        stored = array.astype(dtype)
    # what is finite must stay so; NaN and infinity are for the teacher to judge
    fits = np.isinf(stored) == np.isinf(array) if dtype.kind == "f" else stored == array
    return stored if bool(np.all(fits)) else None


def _floats(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not all(isinstance(number, int | float) for number in array.flat):
        return array
    try:
        return array.astype(np.float64)
    except OverflowError:
        return array


def _reason(name: str, type_: ColumnType, value: Any) -> str:
    if value is None:
        return f"{name} is missing"
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits
        shown = type(value).__name__
    return f"{name} must be {type_.describe()}, got {shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + '…'}"


class MessagesToBatches(beam.PTransform):
    """Turn JSON messages (bytes) into record batches of up to `batch_rows` rows, of one window each.

    A message that is not a JSON object with a fitting value for every column is counted (`bad_messages`) and left out: a
    stream must not stop for it.

    Args:
      schema: column types; see `parse_schema`.
      batch_rows: most rows of a batch.
    """

    def __init__(self, schema: dict[str, ColumnType], *, batch_rows: int = 1024) -> None:
        super().__init__()
        self.schema, self.batch_rows = schema, batch_rows

    def expand(self, messages: Any) -> Any:
        return (
            messages
            | "Batch" >> beam.BatchElements(min_batch_size=1, max_batch_size=self.batch_rows)
            | "ToArrow" >> beam.ParDo(_ToArrow(self.schema))
        )


class _ToArrow(beam.DoFn):
    def __init__(self, schema: dict[str, ColumnType]) -> None:
        self.schema = schema
        self.bad = Metrics.counter("MessagesToBatches", "bad_messages")

    def process(self, messages: Sequence[bytes]) -> Iterator[pa.RecordBatch]:
        parsed = (parse_message(message) for message in messages)
        batch, _ = rows_to_batch([row for row, _ in parsed if row is not None], self.schema)
        self.bad.inc(len(messages) - batch.num_rows)
        if batch.num_rows:
            yield batch
