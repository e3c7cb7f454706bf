"""The records of all sources as one table of text in the database, in the order of the sources.

A column is named by its place (`c0`, `c1`, ...): the sources' own names never become SQL, so that any name is possible. A
record's number is its row number. What is told apart here stays apart: the `id` of a record is a hash of its columns' names
and of their text before anything is converted, so that it depends on the record alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import duckdb

from distilbeam.pipelines.ingest.database import run, text

ID_DIGITS = 32  # of SHA-256 in hexadecimal


@dataclass(frozen=True)
class RecordsTable:
    """What was loaded.

    Attributes:
      connection: the database; the table is called `records`.
      names: the columns.
      rows: number of records.
      places: finds file and line of records, given their numbers in ascending order.
    """

    connection: duckdb.DuckDBPyConnection
    names: tuple[str, ...]
    rows: int
    places: Callable[[Sequence[int]], list[tuple[str, int | None]]]

    def column(self, name: str) -> str:
        """Return what a column is called in the table."""
        return f"c{self._places[name]}"

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}


def content_of(table: RecordsTable) -> str:
    """Write the expression for all of a record in one text that no record of other values or names has.

    A column without a value adds nothing. Where no record lacks one, that need not be asked for each: one `concat` of all
    such columns takes half the time of one for each of them.
    """
    counts = ", ".join(f"count({table.column(name)})" for name in table.names)
    present = dict(zip(table.names, run(table.connection, f"SELECT {counts} FROM records")[0], strict=True))
    parts: list[str] = []
    for name in sorted(table.names):
        value = table.column(name)
        own = [text(f"{len(name)}:{name}"), f"strlen({value})", "':'", value]
        parts += (
            own if present[name] == table.rows else [f"CASE WHEN {value} IS NOT NULL THEN concat({', '.join(own)}) END"]
        )
    return f"concat({', '.join(parts)})"


def count(connection: duckdb.DuckDBPyConnection) -> int:
    """Return the number of records."""
    rows: int = run(connection, "SELECT count(*) FROM records")[0][0]
    return rows
