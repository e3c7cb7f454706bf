"""The records of all sources as one table of text in the database, in the order of the sources.

A column is named by its place (`c0`, `c1`, ...): the sources' own names never become SQL, so that any name is possible. A
record's number is its row number. What is told apart here stays apart: the `id` of a record is a hash of its columns' names
and of their text before anything is converted, so that it depends on the record alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
        return f"c{self.names.index(name)}"


def id_of(columns: dict[str, str]) -> str:
    """Write the expression for a record's id.

    Args:
      columns: name -> expression of its text; null where the record does not have it.
    """
    return f"left(sha256({content_of(columns)}), {ID_DIGITS})"


def content_of(columns: dict[str, str]) -> str:
    """Write the expression for all of a record in one text that no other record has; see `id_of`."""
    parts = [
        f"CASE WHEN {value} IS NULL THEN '' ELSE {text(f'{len(name)}:{name}')} || strlen({value}) || ':' || {value} END"
        for name, value in sorted(columns.items())
    ]
    return f"concat({', '.join(parts or [text('')])})"


def count(connection: duckdb.DuckDBPyConnection) -> int:
    """Return the number of records."""
    rows: int = run(connection, "SELECT count(*) FROM records")[0][0]
    return rows
