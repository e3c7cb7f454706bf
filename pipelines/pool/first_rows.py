"""The first rows of a pool, for what has to be known of one before the others are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from distilbeam.pipelines.pool.read_splits import read_unit
from distilbeam.pipelines.pool.splits import Pool
from distilbeam.teacher.tfserving.probing import FIRST_ROWS


def first_rows(pool: Callable[[], Pool], columns: Sequence[str]) -> Callable[[], Iterator[pa.RecordBatch]]:
    """Make the function that reads a pool's first rows.

    Args:
      pool: plans the pool, or raises `ValueError` where there is none yet.
      columns: columns to read.
    """

    def read() -> Iterator[pa.RecordBatch]:
        try:
            unit = pool().units[0]
        except ValueError:  # a watched folder may be empty still; without a row the server has to say the shape
            return
        for batch in read_unit(unit, columns, FIRST_ROWS):
            yield batch
            return

    return read
