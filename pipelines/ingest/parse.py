"""Survey and parse: what the columns of a unit of TFRecord files or images hold, and its records as typed rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distilbeam.pipelines.ingest.binary_records import CONTENT_BYTES, example_records, image_records
from distilbeam.pipelines.ingest.columns import ColumnCounts, ColumnType
from distilbeam.pipelines.ingest.committing import FilePerItem
from distilbeam.pipelines.ingest.conversion import convert
from distilbeam.pipelines.ingest.pool_columns import PoolColumns
from distilbeam.pipelines.ingest.records import Bad, Records
from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.pipelines.ingest.sources import SourceUnit
from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import read_json, write_json

# Behind the pool's columns, whose names may be any: these are found by their place.
INTERNAL = (
    pa.field("key", pa.string()),  # what must be unique: the user's id, or the hash of the content
    pa.field("content", pa.binary(CONTENT_BYTES)),
    pa.field("file", pa.string()),
    pa.field("line", pa.int64()),
)


def read_records(unit: SourceUnit, options: IngestOptions) -> Iterator[Records]:
    """Read a unit's records."""
    for block in unit.blocks:
        if options.format == "images":
            yield from image_records(block, options.class_column)
        else:
            yield from example_records(block)


def image_columns(options: IngestOptions) -> dict[str, ColumnType]:
    """Return the columns of a pool of images."""
    columns = {"image": ColumnType("binary"), "path": ColumnType("string")}
    return columns | ({options.class_column: ColumnType("string")} if options.class_column else {})


class Survey(FilePerItem[SourceUnit]):
    """The work of the survey phase: counts of the values of each column, one JSON file per unit."""

    def __call__(self, unit: SourceUnit) -> None:
        """Count the unit's values."""
        counts: dict[str, ColumnCounts] = {}
        for records in read_records(unit, self.options):
            for name, values in records.columns.items():
                counts.setdefault(name, ColumnCounts()).add(values)
        write_json(self.file(unit), [[name, column.to_json()] for name, column in counts.items()])

    def read(self, unit: SourceUnit) -> dict[str, ColumnCounts]:
        """Read the unit's counts, columns in the order in which they were met."""
        return {name: ColumnCounts.from_json(data) for name, data in read_json(self.file(unit))}


@dataclass(frozen=True)
class Parse(FilePerItem[SourceUnit]):
    """The work of the parse phase: `<uid>.arrow` of typed rows per unit, and its bad records, `<uid>.jsonl`.

    Attributes:
      pool: the pool's columns.
    """

    pool: PoolColumns

    def __call__(self, unit: SourceUnit) -> None:
        """Parse the unit's records and commit them."""
        rows = bad = 0
        files = self.files(unit)
        with (
            replacing(files["bad"]) as bad_file,
            replacing(files["rows"]) as rows_file,
            bad_file.open("w") as letters,
            pa.ipc.new_file(str(rows_file), self.schema) as writer,
        ):
            for records in read_records(unit, self.options):
                table, failures = self._typed(records)
                for failure in (*records.bad, *failures):
                    letters.write(json.dumps(failure.to_json()) + "\n")
                bad += len(records.bad) + len(failures)
                if table.num_rows:
                    writer.write_table(table)
                rows += table.num_rows
        write_json(files["commit"], {"rows": rows, "bad": bad})

    def files(self, unit: SourceUnit) -> dict[str, Path]:
        """Return the unit's files."""
        path = Path(self.output) / unit.uid
        return {
            name: path.with_suffix(end) for name, end in (("rows", ".arrow"), ("bad", ".jsonl"), ("commit", ".json"))
        }

    @property
    def schema(self) -> pa.Schema:
        """Schema of the rows: the pool's columns, then the internal ones."""
        return pa.schema([*self.pool.schema, *INTERNAL])

    def _typed(self, records: Records) -> tuple[pa.Table, list[Bad]]:
        count = len(records.lines)
        arrays: dict[str, pa.Array] = {}
        errors: dict[int, str] = {}
        for name, type_ in self.pool.columns.items():
            values = records.columns.get(name, [None] * count)
            arrays[name], wrong = convert(values, type_)
            if name == self.options.id_column:
                wrong = wrong | arrays[name].is_null().to_numpy(zero_copy_only=False)
            for row in np.flatnonzero(wrong):
                errors.setdefault(int(row), _sentence(name, type_, values[row]))
        bad = [Bad(records.file, self._line(records, row), error) for row, error in sorted(errors.items())]
        content = [value.hex() for value in records.contents]
        own = self.options.id_column
        key = content if own is None else [str(value) for value in arrays[own].to_pylist()]
        pool = [arrays[name] if name in arrays else pa.array(content) for name in self.pool.schema.names]
        lines = [self._line(records, row) for row in range(count)]
        internal = [key, records.contents, [records.file] * count, lines]
        columns = [*pool, *(pa.array(values, field.type) for values, field in zip(internal, INTERNAL, strict=True))]
        table = pa.Table.from_arrays(columns, schema=self.schema)
        return table.take(np.setdiff1d(np.arange(count), list(errors))) if errors else table, bad

    def _line(self, records: Records, row: int) -> int | None:
        return None if self.options.format == "images" else records.lines[row]


def _sentence(name: str, type_: ColumnType, value: Any) -> str:
    if value is None or (isinstance(value, np.ndarray) and value.size == 0 and type_.kind != "vector"):
        return f"column {name} must have a value"
    found = f"shape {list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)[:80]
    return f"column {name} must be {type_.describe()}, got {found}"
