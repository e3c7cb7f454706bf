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


def find_duplicates(connection: duckdb.DuckDBPyConnection, key: str, content: str | None) -> Duplicates:
    """Find the records of the table `records` that are left out; those in the table `bad` do not count.

    Args:
      connection: the database.
      key: expression for what must be unique.
      content: expression for all of a record; None where the key is a hash of it.
    """
    run(
        connection,
        f"""CREATE TEMP TABLE keys AS SELECT rowid AS number, {key} AS key FROM records
        WHERE rowid NOT IN (SELECT number FROM bad)""",
    )
    run(
        connection,
        """CREATE TEMP TABLE repeated AS SELECT number, first FROM keys
        JOIN (SELECT key, min(number) AS first FROM keys GROUP BY key HAVING count(*) > 1) USING (key)
        WHERE number > first""",
    )
    run(connection, "DROP TABLE keys")
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
