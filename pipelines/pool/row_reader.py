"""Reading chosen rows of the pool in ascending order, each row group once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.pool.pool_types import cast_batches
from distilbeam.pipelines.pool.read_splits import opened_unit, read_groups
from distilbeam.pipelines.pool.splits import Unit


class RowReader:
    """Reads rows of units; a call goes on where the one before stopped, so that shards that share a row group decode it once.

    Args:
      columns: columns to read.
      batch_rows: most rows in a batch.
    """

    def __init__(self, columns: Sequence[str], batch_rows: int) -> None:
        self._columns, self._batch_rows = columns, batch_rows
        self._path = ""
        self._file: pq.ParquetFile | None = None
        self._casts: Sequence[tuple[str, pa.DataType]] = ()
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._start = 0  # row of the unit at which self._batch starts

    def read(self, unit: Unit, rows: npt.NDArray[np.int64]) -> Iterator[tuple[pa.RecordBatch, slice]]:
        """Read rows of a unit, from only the row groups that hold some.

        Args:
          unit: where the rows are.
          rows: int64 [n], ascending rows of the unit.

        Yields:
          A batch of some of the rows, in their order, and which of `rows` they are. Rows that are neighbours in the file
          are not copied.

        Raises:
          ValueError: the file is damaged, or was replaced since it was planned.
        """
        file = self._open(unit)
        first = 0
        for group, size in enumerate(unit.sizes, unit.row_groups[0]):
            stop = first + size
            lo, hi = np.searchsorted(rows, [first, stop])
            if hi > lo:
                yield from self._of_group(file, group, first, rows, slice(lo, hi))
            first = stop

    def _of_group(
        self, file: pq.ParquetFile, group: int, first: int, rows: npt.NDArray[np.int64], wanted: slice
    ) -> Iterator[tuple[pa.RecordBatch, slice]]:
        # Begin the row group anew only where it must be: another one, or rows before the batch that was decoded last. The next
        # shard of a task asks for later rows of the same row group and goes on with the batch that is at hand.
        if group != self._group or self._batch is None or rows[wanted.start] < self._start:
            self._group, self._start = group, first
            batches = read_groups(file, self._path, [group], self._columns, self._batch_rows)
            self._batches = cast_batches(batches, self._casts, self._path)
            self._batch = next(self._batches)
        lo = wanted.start
        while lo < wanted.stop:
            assert self._batch is not None
            stop = self._start + self._batch.num_rows
            hi = lo + int(np.searchsorted(rows[lo : wanted.stop], stop))
            if hi > lo:  # batches without a wanted row are decoded, as Parquet pages follow each other, and dropped
                yield _taken(self._batch, rows[lo:hi] - self._start), slice(lo, hi)
            lo = hi
            if lo < wanted.stop:  # not before more is wanted: the batch at hand may have the next shard's rows
                self._start, self._batch = stop, next(self._batches)

    def _open(self, unit: Unit) -> pq.ParquetFile:
        if self._file is None or unit.path != self._path:  # units of one file share its handle and its footer
            self._path, self._file, self._group, self._casts = unit.path, opened_unit(unit), -1, unit.casts
        return self._file


def _taken(batch: pa.RecordBatch, rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
    if rows[-1] - rows[0] == len(rows) - 1:  # ascending and without gaps: a view, no copy
        return batch.slice(rows[0], len(rows))
    return batch.take(pa.array(rows))
