"""The rows of a file of examples in batches, from any row on: the columns that a student reads, and those that are carried.

A row that cannot be read (a line that is not JSON, too few fields, text that is not UTF-8) keeps its place, with a reason.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from distilbeam.inputs.config import InputConfig
from distilbeam.pipelines.ingest.lines import DAMAGES, NOT_TEXT, read_lines, too_long
from distilbeam.pipelines.pool.datasets import require_columns
from distilbeam.pipelines.pool.pool_files import open_parquet
from distilbeam.pipelines.pool.read_splits import read_groups
from distilbeam.pipelines.prediction.data_files import DataFile
from distilbeam.pipelines.prediction.values import from_csv, from_json, require_holds

LIMIT_BYTES = 16 * 2**20  # of a line
IMAGES_BYTES = 256 * 2**20  # of the images of a batch, about


@dataclass(frozen=True)
class Wanted:
    """What is read: the student's input, the shape of an example of it, columns to carry along, most rows of a batch."""

    input: InputConfig
    input_shape: tuple[int, ...]
    carried: tuple[str, ...]
    batch_rows: int


@dataclass(frozen=True)
class Rows:
    """Rows that follow one another.

    Attributes:
      input: the columns that the student reads.
      carried: the columns that are carried along, of the same rows.
      reasons: why some rows could not be read, by their place in these.
    """

    input: pa.Table
    carried: pa.Table
    reasons: Mapping[int, str] = field(default_factory=dict)


def read_rows(file: DataFile, start: int, wanted: Wanted) -> Iterator[Rows]:
    """Read a file from a row on.

    Args:
      file: the file.
      start: rows to pass over.
      wanted: what is read of the others.

    Yields:
      The rows, in their order.

    Raises:
      ValueError: the file is damaged, lacks a column, or its format cannot hold what the student reads.
    """
    require_holds(file.format, wanted.input)
    readers = {"parquet": _parquet, "csv": _csv, "jsonl": _jsonl, "text": _text, "images": _images}
    try:
        yield from readers[file.format](file, start, wanted)
    except (*DAMAGES, csv.Error) as e:
        raise ValueError(f"--data: {file.source.path} cannot be read to its end: {e}; write it again") from e


def of_json(lines: Sequence[bytes], wanted: Wanted) -> tuple[Rows, list[dict[str, Any]]]:
    """Parse JSON lines; return their rows, without carried columns, and the objects themselves."""
    objects, reasons = [], {}
    for row, line in enumerate(lines):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"a line must be an object, got {str(value)[:40]}")
        except (ValueError, RecursionError) as e:
            reasons[row] = f"the line is no JSON object: {e}"
            value = {}
        objects.append(value)
    arrays = {}
    for name in wanted.input.columns:
        arrays[name], more = from_json([value.get(name) for value in objects], name, wanted.input)
        reasons = more | reasons
    return Rows(pa.table(arrays), pa.table({}), reasons), objects


def _parquet(file: DataFile, start: int, wanted: Wanted) -> Iterator[Rows]:
    opened = open_parquet(file.source.path, "--data")
    read = list(dict.fromkeys([*wanted.input.columns, *wanted.carried]))
    require_columns(opened.schema_arrow.names, read, f"--data: {file.source.path}")
    groups, skipped = list(range(opened.metadata.num_row_groups)), start
    while groups and (rows := opened.metadata.row_group(groups[0]).num_rows) <= skipped:
        skipped -= rows
        del groups[0]
    for batch in read_groups(opened, file.source.path, groups, read, wanted.batch_rows) if groups else ():
        table = pa.Table.from_batches([batch.slice(min(skipped, batch.num_rows))])
        skipped -= min(skipped, batch.num_rows)
        if table.num_rows:
            yield Rows(table.select(list(wanted.input.columns)), table.select(list(wanted.carried)))


def _jsonl(file: DataFile, start: int, wanted: Wanted) -> Iterator[Rows]:
    lines = itertools.islice((line for line in _lines(file) if line is None or line.strip()), start, None)
    first = start == 0
    while batch := list(itertools.islice(lines, wanted.batch_rows)):
        rows, objects = of_json([b"" if line is None else line for line in batch], wanted)
        if first:
            _require_keys(objects, [*wanted.input.columns, *wanted.carried], file)
            first = False
        too_big = {row: too_long(LIMIT_BYTES) for row, line in enumerate(batch) if line is None}
        arrays = {}
        for name in wanted.carried:
            values = [value.get(name) for value in objects]
            try:
                arrays[name] = pa.array(values)
            except (pa.ArrowException, TypeError, ValueError, OverflowError) as e:
                raise ValueError(
                    f"--columns: the values of {name} in {file.source.path} make no column ({str(e).splitlines()[0]}); leave it "
                    "out"
                ) from e
        yield Rows(rows.input, pa.table(arrays), {**rows.reasons, **too_big})


def _csv(file: DataFile, start: int, wanted: Wanted) -> Iterator[Rows]:
    csv.field_size_limit(LIMIT_BYTES)
    delimiter = "\t" if ".tsv" in Path(file.source.path).suffixes else ","
    records = csv.reader(_texts(file), delimiter=delimiter)
    header = next(records, None)
    if header is None:
        return
    read = list(dict.fromkeys([*wanted.input.columns, *wanted.carried]))
    require_columns(header, read, f"--data: {file.source.path}")
    places = {name: header.index(name) for name in read}
    numbers = math.prod(wanted.input_shape)
    rest = itertools.islice(
        (record for record in records if record), start, None
    )  # the csv module gives [] for blank lines
    while batch := list(itertools.islice(rest, wanted.batch_rows)):
        reasons = {
            row: f"the record has {len(record):,} fields, the header {len(header):,}"
            for row, record in enumerate(batch)
            if len(record) != len(header)
        }
        fields = {
            name: [record[place] if len(record) == len(header) else None for record in batch]
            for name, place in places.items()
        }
        for name, values in fields.items():
            for row in _not_utf8(values):
                values[row] = None
                reasons[row] = f"column {name}: {NOT_TEXT}"
        arrays = {}
        for name in wanted.input.columns:
            arrays[name], more = from_csv(fields[name], name, wanted.input, numbers)
            reasons = more | reasons
        carried = {name: pa.array(fields[name], pa.string()) for name in wanted.carried}
        yield Rows(pa.table(arrays), pa.table(carried), reasons)


def _text(file: DataFile, start: int, wanted: Wanted) -> Iterator[Rows]:
    (column,) = wanted.input.columns
    require_columns([column], wanted.carried, f"--data: {file.source.path}")
    lines = itertools.islice(_lines(file), start, None)
    while batch := list(itertools.islice(lines, wanted.batch_rows)):
        texts: list[str | None] = []
        reasons: dict[int, str] = {}
        for row, line in enumerate(batch):
            try:
                texts.append(None if line is None else line.removesuffix(b"\r").decode())
            except UnicodeDecodeError as e:
                texts.append(None)
                reasons[row] = f"{NOT_TEXT}: {e}"
            if line is None:
                reasons[row] = too_long(LIMIT_BYTES)
        table = pa.table({column: pa.array(texts, pa.string())})
        yield Rows(table, table.select(list(wanted.carried)), reasons)


def _images(file: DataFile, start: int, wanted: Wanted) -> Iterator[Rows]:
    if wanted.carried:
        raise ValueError(
            f"--columns: image files have no columns to carry along, got {', '.join(wanted.carried)}; source_file says which "
            "image a prediction is of"
        )
    paths = file.images[start:]
    while paths:
        values: list[bytes | None] = []
        reasons: dict[int, str] = {}
        size = 0
        for row, path in enumerate(paths[: wanted.batch_rows]):
            try:
                values.append(Path(path).read_bytes())
                size += len(values[-1] or b"")
            except OSError as e:
                values.append(None)
                reasons[row] = f"the file cannot be read: {e.strerror or e}"
            if size >= IMAGES_BYTES:
                break
        paths = paths[len(values) :]
        (column,) = wanted.input.columns
        yield Rows(pa.table({column: pa.array(values, pa.binary())}), pa.table({}), reasons)


def _lines(file: DataFile) -> Iterator[bytes | None]:
    """The lines of a file without their ends; None in the place of one that is too long."""
    for piece in read_lines(file.source, LIMIT_BYTES):
        yield from (None for _ in piece.bad)
        data = piece.data.removesuffix(b"\n")
        if piece.data:
            yield from (None if len(line) > LIMIT_BYTES else line for line in data.split(b"\n"))


def _texts(file: DataFile) -> Iterator[str]:
    """The lines of a CSV file, what is not UTF-8 in them kept apart as halves of surrogate pairs."""
    for number, line in enumerate(_lines(file), 1):
        if line is None:
            raise ValueError(f"--data: line {number:,} of {file.source.path}: {too_long(LIMIT_BYTES)}")
        yield line.decode("utf-8", "surrogateescape") + "\n"


def _not_utf8(values: Sequence[str | None]) -> list[int]:
    try:
        "".join(value or "" for value in values).encode()
    except UnicodeEncodeError:
        return [row for row, value in enumerate(values) if value and any("\ud800" <= c <= "\udfff" for c in value)]
    return []


def _require_keys(objects: Sequence[Mapping[str, Any]], names: Sequence[str], file: DataFile) -> None:
    """Check that the first rows have the columns, of which each row may lack some."""
    there = list(dict.fromkeys(key for value in objects for key in value))
    missing = [name for name in names if name not in there]
    if there and missing:
        raise ValueError(
            f"--data: none of the first {len(objects):,} lines of {file.source.path} has {', '.join(missing)}; they have "
            f"{', '.join(there[:20])}"
        )
