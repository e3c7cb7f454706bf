"""Records whose key was met before, in the order of the sources.

The first record with a key stays. A later one is a duplicate if its content is the same, and a conflict (one id, two
contents) if not. DuckDB goes to the disk where the keys outgrow its memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
import numpy.typing as npt


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
    found = connection.execute(
        f"""SELECT number, content <> first_content AS conflicting FROM (
        SELECT number, content, min(number) OVER same AS first, arg_min(content, number) OVER same AS first_content FROM (
        SELECT rowid AS number, {key} AS key, {content or "''"} AS content FROM records
        WHERE rowid NOT IN (SELECT number FROM bad) AND {hashed} IN (
        SELECT hashed FROM (SELECT {hashed} AS hashed FROM records) GROUP BY hashed HAVING count(*) > 1))
        WINDOW same AS (PARTITION BY key)) WHERE number > first ORDER BY number"""
    ).fetchnumpy()
    numbers, conflicting = np.asarray(found["number"], np.int64), np.asarray(found["conflicting"], bool)
    return Duplicates(numbers[~conflicting], numbers[conflicting])
