"""JSON messages as Arrow record batches of one schema.

A schema is written as `id:string,x:float32[64],pixels:uint8[8,8],n:int64`: names with their types; a type with a shape is a
vector, stored as the pools of `ingest` store them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.metrics import Metrics

from distilbeam.pipelines.ingest.columns import ColumnType, arrow_field
from distilbeam.pipelines.ingest.conversion import convert

_COLUMN = re.compile(r"\s*([A-Za-z_]\w*)\s*:\s*(\w+)\s*(?:\[([\d,\s]+)\])?\s*")
_NUMBERS = ("float32", "uint8", "int32", "int64")
_SCALARS = ("string", "binary", "int64", "float64", "bool")


def parse_schema(text: str) -> dict[str, ColumnType]:
    """Read a schema; see the module.

    Raises:
      ValueError: a column that is not `name:type` or `name:type[shape]`.
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
        sizes = () if shape is None else tuple(int(size) for size in shape.split(","))
        columns[name] = ColumnType(type_) if shape is None else ColumnType("vector", type_, sizes)
    return columns


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
        rows = [row for message in messages if isinstance(row := _parsed(message), dict)]
        good = np.ones(len(rows), bool)
        arrays = []
        for name, type_ in self.schema.items():
            array, _ = convert([_value(row.get(name), type_) for row in rows], type_)
            good &= array.is_valid().to_numpy(zero_copy_only=False)
            arrays.append(array)
        self.bad.inc(len(messages) - int(good.sum()))
        if good.any():
            schema = pa.schema([arrow_field(name, type_) for name, type_ in self.schema.items()])
            yield pa.record_batch(arrays, schema=schema).filter(pa.array(good))


def _parsed(message: bytes) -> Any:
    try:
        return json.loads(message)
    except ValueError:
        return None


def _value(value: Any, type_: ColumnType) -> Any:
    """Turn a list of numbers into an array of a vector's shape; whatever does not fit stays what it is."""
    if type_.kind != "vector" or not isinstance(value, list):
        return value
    try:
        array = np.array(value)
    except ValueError:
        return value
    fits = array.dtype.kind in "if" and array.size == math.prod(type_.shape)
    if type_.dtype != "float32":
        fits = fits and bool((array.astype(type_.dtype) == array).all())
    return array.reshape(type_.shape) if fits else None
