"""Records whose key was met before, in the order of the sources.

The first record with a key stays. A later one is a duplicate if its content is the same, and a conflict (one id, two
contents) if not. DuckDB goes to the disk where the keys outgrow its memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
import numpy.typing as npt

from distilbeam.pipelines.ingest.database import run


@dataclass(frozen=True)
class Duplicates:
    """Numbers of the records that are left out, ascending: those that repeat one, those that contradict one."""

    equal: npt.NDArray[np.int64]
    conflicting: npt.NDArray[np.int64]


def find_duplicates(
    connection: duckdb.DuckDBPyConnection, key: str, content: str | None, columns: str | None = None
) -> Duplicates:
    """Find the records of the table `records` that are left out; those in the table `bad` do not count.

    Args:
      connection: the database.
      key: expression for what must be unique.
      content: expression for all of a record; None where the key says it.
      columns: what the key is made of, where it is long: the key itself is made only for records whose hash of 64 bits
        occurs more than once.
    """
    hashed = f"hash({columns or key})"
    run(
        connection,
        f"""CREATE TEMP TABLE repeated AS SELECT number, first FROM (
        SELECT number, min(number) OVER (PARTITION BY key) AS first FROM (
        SELECT rowid AS number, {key} AS key FROM records WHERE rowid NOT IN (SELECT number FROM bad) AND
        {hashed} IN (SELECT hashed FROM (SELECT {hashed} AS hashed FROM records) GROUP BY hashed HAVING count(*) > 1)))
        WHERE number > first""",
    )
    conflicting = []
    if content is not None:  # of these few records only
        contents = f"SELECT rowid AS number, {content} AS content FROM records WHERE rowid IN"
        conflicting = run(
            connection,
            f"""SELECT repeated.number FROM repeated
            JOIN ({contents} (SELECT number FROM repeated)) later ON later.number = repeated.number
            JOIN ({contents} (SELECT first FROM repeated)) earlier ON earlier.number = first
            WHERE later.content <> earlier.content ORDER BY repeated.number""",
        )
    numbers = [number for (number,) in run(connection, "SELECT number FROM repeated ORDER BY number")]
    conflicts = np.array([number for (number,) in conflicting], np.int64)
    return Duplicates(np.setdiff1d(np.array(numbers, np.int64), conflicts), conflicts)
