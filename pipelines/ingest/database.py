"""A DuckDB database of one ingest: bounded in memory, closed to everything outside of it.

Its tables are temporary: they lie in memory and go to files in `spilled` where they outgrow it. Tables of the database's own
file would be compressed and written in any case, which takes four times as long as to read the CSV file they come from.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import psutil
import pyarrow as pa

_MEMORY_BYTES = 4 * 2**30  # enough for 10^8 keys without the disk
_MEMORY_SHARE = 0.4  # of the machine's


@contextmanager
def opened(work: Path, files: Iterable[str]) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a new database in a directory; what an earlier one left there is removed.

    Text of the sources never becomes SQL, but a reader of files that strangers wrote is still shut in: it loads and
    fetches no extension, and after its settings are locked it opens the files named here and those in `work` alone.

    Args:
      work: a directory that nobody else works in.
      files: the files that are read.
    """
    for name in ("ingest.duckdb", "ingest.duckdb.wal"):
        (work / name).unlink(missing_ok=True)
    shutil.rmtree(work / "spilled", ignore_errors=True)
    limit = int(min(_MEMORY_BYTES, _MEMORY_SHARE * psutil.virtual_memory().total))
    connection = duckdb.connect(
        str(work / "ingest.duckdb"),
        config={
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "memory_limit": f"{limit // 2**20}MiB",
            "temp_directory": str(work / "spilled"),
            "preserve_insertion_order": "true",  # a row's number is its place in the order of the sources
        },
    )
    try:
        with connection:
            run(connection, f"SET allowed_directories = [{text(f'{work}/')}]")
            run(connection, f"SET allowed_paths = [{', '.join(text(file) for file in files)}]")
            run(connection, "SET python_enable_replacements = false")  # a table is never a Python variable
            run(connection, "SET enable_external_access = false")
            run(connection, "SET lock_configuration = true")
            yield connection
    finally:
        connection.close()


def run(connection: duckdb.DuckDBPyConnection, sql: str, **tables: Any) -> list[tuple[Any, ...]]:
    """Run a statement to its end.

    Args:
      connection: the database.
      sql: the statement.
      **tables: Arrow tables or readers that it calls by these names.

    Returns:
      Its rows.
    """
    for name, table in tables.items():
        connection.register(name, table)
    try:
        rows: list[tuple[Any, ...]] = connection.execute(sql).fetchall()
    finally:
        for name in tables:
            connection.unregister(name)
    return rows


def arrow(connection: duckdb.DuckDBPyConnection, sql: str) -> pa.Table:
    """Run a query and return its result."""
    return connection.sql(sql).to_arrow_table()


def streamed(connection: duckdb.DuckDBPyConnection, sql: str) -> Iterator[tuple[Any, ...]]:
    """Run a query and hand on its rows; no other statement may run before their end."""
    result = connection.execute(sql)
    while rows := result.fetchmany(10_000):
        yield from rows


def text(value: str) -> str:
    """Write a string of SQL."""
    return "'" + value.replace("'", "''") + "'"
