"""The records of CSV, JSON lines and text with types: which do not fit, and the rest as Arrow tables of the pool's schema."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from distilbeam.pipelines.ingest.columns import arrow_field
from distilbeam.pipelines.ingest.conversion import nested_vectors
from distilbeam.pipelines.ingest.database import arrow, run
from distilbeam.pipelines.ingest.pool_columns import PoolColumns
from distilbeam.pipelines.ingest.records import Bad
from distilbeam.pipelines.ingest.records_table import ID_DIGITS, RecordsTable, content_of
from distilbeam.pipelines.ingest.text_types import TextTypes, shown
from distilbeam.pipelines.ingest.vectors import field_numbers, fields_fit

# of records that are converted at once: three of DuckDB's row groups, which its threads share (one takes 1.15 times as long)
_TABLE_BYTES, _TABLE_ROWS = 64 * 2**20, 3 * 122_880
_AT_ONCE = 10_000  # bad records whose lines are looked up at once


@dataclass(frozen=True)
class TypedText:
    """Records of text and the types of their columns.

    Attributes:
      table: the records.
      pool: the pool's columns.
      types: how the format's text is read.
      unsure: columns in which a value may not fit.
    """

    table: RecordsTable
    pool: PoolColumns
    types: TextTypes
    unsure: frozenset[str]

    @property
    def key(self) -> str:
        """The expression for what must be unique."""
        name = self.pool.id_column
        return self._content if name is None else f"({self._value(name)})::VARCHAR"

    @property
    def content(self) -> str | None:
        """The expression for all of a record, where the key does not say it."""
        return None if self.pool.id_column is None else self._content

    @property
    def columns(self) -> str | None:
        """What the key is made of, where that is the whole record."""
        return ", ".join(map(self.table.column, self.table.names)) if self.pool.id_column is None else None

    @cached_property
    def _content(self) -> str:
        return content_of(self.table)

    def find_bad(self) -> int:
        """Write the numbers of the records that do not fit to the table `bad`; return how many there are."""
        conditions = [(name, self._fits(name)) for name in self.pool.columns if self._is_unsure(name)]
        cases = " ".join(f"WHEN NOT {fits} THEN {i}" for i, (_, fits) in enumerate(conditions))
        which = f"CASE {cases} END" if cases else "NULL"
        run(
            self.table.connection,
            f"""CREATE TEMP TABLE bad AS SELECT * FROM (SELECT rowid AS number, {which} AS column_index FROM records)
            WHERE column_index IS NOT NULL""",
        )
        found: int = run(self.table.connection, "SELECT count(*) FROM bad")[0][0]
        return found

    def bad(self) -> Iterator[Bad]:
        """Say what is wrong with the records that `find_bad` found."""
        names = [name for name in self.pool.columns if self._is_unsure(name)]
        values = " ".join(f"WHEN {i} THEN {self._shown(name)}" for i, name in enumerate(names))
        numbers = run(self.table.connection, "SELECT number FROM bad ORDER BY number")
        for start in range(0, len(numbers), _AT_ONCE):
            low, high = numbers[start][0], numbers[min(start + _AT_ONCE, len(numbers)) - 1][0]
            rows = run(
                self.table.connection,
                f"""SELECT number, column_index, CASE column_index {values} END FROM records
                JOIN bad ON records.rowid = number WHERE number BETWEEN {low} AND {high} ORDER BY number""",
            )
            for (file, line), (_, index, value) in zip(self.table.places([row[0] for row in rows]), rows, strict=True):
                yield Bad(file, line, self._sentence(names[index], value))

    def tables(self) -> Iterator[pa.Table]:
        """Convert all records, in their order and with the bad ones, whose values mean nothing."""
        values = [f"{self._value(name)} AS c{i}" for i, name in enumerate(self.pool.columns)]
        values += [] if self.pool.id_column else [f"left(sha256({self._content}), {ID_DIGITS}) AS id"]
        step = self._step()
        for start in range(0, self.table.rows, step):
            found = arrow(
                self.table.connection,
                f"SELECT {', '.join(values)}, rowid AS number FROM records WHERE rowid BETWEEN {start} AND {start + step - 1}",
            )
            numbers = np.concatenate([np.from_dlpack(chunk) for chunk in found["number"].chunks])
            rows = min(step, self.table.rows - start)
            assert np.array_equal(numbers, np.arange(start, start + rows)), (
                "records must be in their order without a gap"
            )
            yield self._packed(found)

    def places(self, numbers: Sequence[int]) -> list[tuple[str, int | None]]:
        """Find file and line of records, given their numbers in ascending order."""
        return self.table.places(numbers)

    def _packed(self, found: pa.Table) -> pa.Table:
        arrays: dict[str, pa.Array] = {}
        for i, (name, type_) in enumerate(self.pool.columns.items()):
            column = found[f"c{i}"].combine_chunks()
            column = nested_vectors(column, type_) if type_.kind == "vector" else column
            arrays[name] = column.cast(arrow_field(name, type_).type)
        if self.pool.id_column is None:
            arrays["id"] = found["id"]
        schema = self.pool.schema
        return pa.table([arrays[name] for name in schema.names], schema=schema)

    def _step(self) -> int:
        """Return how many records are converted at once, by their mean size."""
        sizes = ", ".join(f"strlen({self.table.column(name)})" for name in self.table.names)
        mean = run(self.table.connection, f"SELECT avg(list_sum([{sizes}])) FROM records WHERE rowid % 8 = 0")[0][0]
        return max(64, min(_TABLE_ROWS, int(_TABLE_BYTES / ((mean or 0) + 64))))

    def _is_unsure(self, name: str) -> bool:
        return name in self.unsure or name in self.pool.members or name == self.pool.id_column

    def _fits(self, name: str) -> str:
        type_ = self.pool.columns[name]
        if name in self.pool.members:
            return fields_fit(self._members(name), type_.dtype)
        column = self.table.column(name)
        fits = self.types.fits(column, type_) if name in self.unsure else "true"
        present = f"({self._value(name)}) IS NOT NULL" if name == self.pool.id_column else "true"
        return f"({fits} AND {present})"

    def _value(self, name: str) -> str:
        type_ = self.pool.columns[name]
        if name in self.pool.members:
            return field_numbers(self._members(name), type_.dtype)  # records that do not fit are left out later
        value = self.types.converted(self.table.column(name), type_)
        return (
            f"CASE WHEN {self.types.fits(self.table.column(name), type_)} THEN {value} END"
            if name in self.unsure
            else value
        )

    def _members(self, name: str) -> list[str]:
        return [self.table.column(member) for member in self.pool.members[name]]

    def _shown(self, name: str) -> str:
        return "NULL" if name in self.pool.members else self.table.column(name)

    def _sentence(self, name: str, value: str | None) -> str:
        type_ = self.pool.columns[name]
        if name in self.pool.members:
            return f"columns of vector {name} must all be {type_.dtype} numbers"
        if value is None or value == "null":
            return f"column {name} must have a value"
        return f"column {name} must be {type_.describe()}, got {shown(value, self.types)}"
