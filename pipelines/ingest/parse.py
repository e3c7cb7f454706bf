"""Survey and parse: what a unit's columns hold, and its records as typed rows with the hash of their content."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distilbeam.pipelines.content_ids import ID_BYTES, content_ids
from distilbeam.pipelines.files import read_json, write_json
from distilbeam.pipelines.ingest.columns import ColumnCounts, ColumnType, arrow_field
from distilbeam.pipelines.ingest.committing import FilePerItem
from distilbeam.pipelines.ingest.conversion import convert, stack_numbers, vector_array
from distilbeam.pipelines.ingest.csv_records import csv_records
from distilbeam.pipelines.ingest.other_records import example_records, image_records, json_records, text_records
from distilbeam.pipelines.ingest.records import Bad, Records, Values
from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.pipelines.ingest.sources import Block, SourceUnit
from distilbeam.teacher.softlabels.atomic import replacing

INTERNAL = (
    pa.field("_key", pa.binary(ID_BYTES)),  # what must be unique: the hash of the user's id, or of the content
    pa.field("_content", pa.binary(ID_BYTES)),
    pa.field("_file", pa.string()),
    pa.field("_line", pa.int64()),
)
PROVENANCE = "path"  # of images: where a file was is not part of its content


def read_records(unit: SourceUnit, options: IngestOptions) -> Iterator[Records]:
    """Read a unit's records; a compressed file that is damaged gives what comes before the damage, and says so."""
    for block in unit.blocks:
        try:
            yield from _reader(block, options)
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            damage = f"the file is damaged, what follows in it cannot be read: {e}"
            yield Records(block.source.name, [], {}, [Bad(block.source.name, None, damage)])


def fixed_columns(options: IngestOptions) -> dict[str, ColumnType] | None:
    """Return the columns of a format that always has the same ones, or None."""
    if options.format == "text":
        return {"text": ColumnType("string")}
    if options.format == "images":
        columns = {"image": ColumnType("binary"), "path": ColumnType("string")}
        return columns | ({options.class_column: ColumnType("string")} if options.class_column else {})
    return None


def _reader(block: Block, options: IngestOptions) -> Iterator[Records]:
    match options.format:
        case "csv":
            return csv_records(block, options.delimiter)
        case "jsonl":
            return json_records(block)
        case "tfrecord":
            return example_records(block)
        case "text":
            return text_records(block)
        case "images":
            return image_records(block, options.class_column)


@dataclass(frozen=True)
class Survey(FilePerItem[SourceUnit]):
    """The work of the survey phase: counts of the values of each column, one JSON file per unit.

    Attributes:
      options: how sources are read.
      output: directory of the counts.
    """

    options: IngestOptions
    output: str

    def __call__(self, unit: SourceUnit) -> None:
        """Count the unit's values."""
        counts: dict[str, ColumnCounts] = {}
        for records in read_records(unit, self.options):
            for name, values in records.columns.items():
                column = counts.setdefault(name, ColumnCounts())
                if self.options.vector_of(name) is None:
                    column.add(values)
        write_json(self.file(unit), [[name, column.to_json()] for name, column in counts.items()])

    def name(self, unit: SourceUnit) -> str:
        """Name the unit by its first file and line."""
        return unit_name(unit)

    def read(self, unit: SourceUnit) -> dict[str, ColumnCounts]:
        """Read the unit's counts, columns in the order in which they were met."""
        return {name: ColumnCounts.from_json(data) for name, data in read_json(self.file(unit))}

    def file(self, unit: SourceUnit) -> Path:
        """Return the file that commits the item."""
        return Path(self.output) / f"{unit.uid}.json"


@dataclass(frozen=True)
class Parse(FilePerItem[SourceUnit]):
    """The work of the parse phase: one Arrow file of typed rows per unit, and its bad records.

    Attributes:
      options: how sources are read.
      columns: the pool's columns with their types, in order.
      members: vector column -> the columns of the sources that it is made of.
      output: directory of the rows: `<uid>.arrow`, `<uid>.jsonl` (bad records), `<uid>.json` (the commit).
    """

    options: IngestOptions
    columns: Mapping[str, ColumnType]
    members: Mapping[str, tuple[str, ...]]
    output: str

    def __call__(self, unit: SourceUnit) -> None:
        """Parse the unit's records and commit them."""
        rows = bytes_ = bad = 0
        files = self.files(unit)
        with (
            replacing(files["bad"]) as bad_file,
            replacing(files["rows"]) as rows_file,
            bad_file.open("w") as letters,
            pa.ipc.new_file(str(rows_file), self.schema) as writer,
        ):
            for records in read_records(unit, self.options):
                table, failures = self._typed(records)
                for failure in sorted([*records.bad, *failures], key=lambda failure: failure.line or 0):
                    letters.write(json.dumps(failure.to_json(), ensure_ascii=False) + "\n")
                bad += len(records.bad) + len(failures)
                if table.num_rows:
                    writer.write_table(table)
                rows, bytes_ = rows + table.num_rows, bytes_ + table.nbytes
        write_json(files["commit"], {"rows": rows, "bytes": bytes_, "bad": bad})

    def name(self, unit: SourceUnit) -> str:
        """Name the unit by its first file and line."""
        return unit_name(unit)

    def file(self, unit: SourceUnit) -> Path:
        """Return the file that commits the unit."""
        return self.files(unit)["commit"]

    def files(self, unit: SourceUnit) -> dict[str, Path]:
        """Return the unit's files."""
        path = Path(self.output) / unit.uid
        return {
            name: path.with_suffix(end) for name, end in (("rows", ".arrow"), ("bad", ".jsonl"), ("commit", ".json"))
        }

    @property
    def schema(self) -> pa.Schema:
        """Schema of the rows: the pool's columns, then the internal ones."""
        return pa.schema([*self.pool_schema, *INTERNAL])

    @property
    def pool_schema(self) -> pa.Schema:
        """Schema of the pool."""
        fields = [arrow_field(name, type_) for name, type_ in self.columns.items()]
        return pa.schema(fields if self.options.id_column else [pa.field("id", pa.string()), *fields])

    def _typed(self, records: Records) -> tuple[pa.Table, list[Bad]]:
        count = len(records.lines)
        arrays: list[pa.Array] = []
        errors: dict[int, str] = {}
        for name, type_ in self.columns.items():
            array, wrong = self._column(name, type_, records, count)
            arrays.append(array)
            for row in np.flatnonzero(wrong):
                errors.setdefault(int(row), self._wrong(name, type_, records, int(row)))
        good = np.setdiff1d(np.arange(count), list(errors))
        schema = pa.schema([arrow_field(name, type_) for name, type_ in self.columns.items()])
        table = pa.table(arrays, schema=schema)
        if errors:
            table = table.take(good)
        bad = [Bad(records.file, self._line(records, row), error) for row, error in sorted(errors.items())]
        lines = [self._line(records, int(row)) for row in good]
        return self._identified(table, records.file, lines), bad

    def _column(self, name: str, type_: ColumnType, records: Records, count: int) -> tuple[pa.Array, Any]:
        if name in self.members:
            matrix, missing = stack_numbers([records.columns[member] for member in self.members[name]], "float64")
            array = matrix.astype(type_.dtype)
            if type_.dtype != "float32":
                missing |= (array != matrix).any(axis=1)
            return vector_array(array, type_), missing
        values: Values | None = records.columns.get(name)
        array, wrong = convert([None] * count if values is None else values, type_)
        if type_.kind == "vector" or name == self.options.id_column:
            wrong = wrong | array.is_null().to_numpy(zero_copy_only=False)
        return array, wrong

    def _wrong(self, name: str, type_: ColumnType, records: Records, row: int) -> str:
        if name in self.members:
            return f"columns of vector {name} must all be {type_.dtype} numbers"
        values = records.columns.get(name)
        value = None if values is None else values[row]
        value = value.as_py() if isinstance(value, pa.Scalar) else value
        if value in (None, "") if not isinstance(value, np.ndarray) else False:
            return f"column {name} must have a value"
        found = f"shape {list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)[:80]
        return f"column {name} must be {type_.describe()}, got {found}"

    def _identified(self, table: pa.Table, file: str, lines: Sequence[int | None]) -> pa.Table:
        content = content_ids(table.drop_columns([PROVENANCE]) if self._has_provenance else table)
        key = content if self.options.id_column is None else content_ids(table.select([self.options.id_column]))
        count = table.num_rows
        own = {} if self.options.id_column else {"id": pa.array([value.hex() for value in content], pa.string())}
        internal = [pa.array(key, INTERNAL[0].type), pa.array(content, INTERNAL[1].type)]
        internal += [pa.array([file] * count, pa.string()), pa.array(lines, pa.int64())]
        return pa.table([*own.values(), *table.columns, *internal], schema=self.schema)

    @property
    def _has_provenance(self) -> bool:
        return self.options.format == "images" and self.options.id_column is None

    def _line(self, records: Records, row: int) -> int | None:
        return None if self.options.format == "images" else records.lines[row]


def unit_name(unit: SourceUnit) -> str:
    """Name a unit by its first file and line, for errors."""
    first = unit.blocks[0]
    more = f" and {len(unit.blocks) - 1} more" if len(unit.blocks) > 1 else ""
    return f"{first.source.path} from line {first.first:,}{more}"
