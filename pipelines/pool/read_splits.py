"""Reading splits and row groups in batches of bounded size, from files that are what they were when they were planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.pool.pool_files import first_line, open_parquet
from distilbeam.pipelines.pool.pool_types import cast_batches
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.storage.paths import StoreError, to_path
from distilbeam.storage.stores import store_of

BATCH_BYTES = 16 * 2**20  # of a batch that is worked on; a few of them are held at a time
ANSWER_BYTES = 64 * 2**20  # of a model's answers to a batch


class DamagedFileError(ValueError):
    """A file of the pool cannot be read to its end."""


def require_unchanged(unit: Unit) -> None:
    """Check that a unit's file is the one that was planned.

    Raises:
      ValueError: it is gone, or was replaced.
    """
    if unit.state is None:
        return
    try:
        now = store_of(unit.path).identity(to_path(unit.path))
    except FileNotFoundError:
        now = ()
    # an inode has a meaning on one machine only
    known = len(now) if now[-1:] == unit.state[-1:] else 2
    if not now or now[:known] != unit.state[:known]:
        what = "was changed" if now else "is gone"
        raise ValueError(
            f"{unit.path} {what} since this was planned, and its rows are not what was asked; give the same command again"
        )


def opened_unit(unit: Unit) -> pq.ParquetFile:
    """Open a unit's file as it was planned.

    Raises:
      ValueError: it is gone, was changed, or is damaged.
    """
    if not store_of(unit.path).by_request:  # an object store says itself what is gone
        require_unchanged(unit)
    file = open_parquet(unit.path)
    require_unchanged(unit)  # it may have been replaced between the two
    return file


def read_unit(unit: Unit, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Read a unit in batches of at most `batch_rows` rows, in row order.

    Raises:
      ValueError: the file is damaged.
    """
    file = opened_unit(unit)
    batches = read_groups(file, unit.path, range(*unit.row_groups), columns, batch_rows)
    return cast_batches(batches, unit.casts, unit.path)


def read_groups(
    file: pq.ParquetFile, path: str, row_groups: Sequence[int], columns: Sequence[str], batch_rows: int
) -> Iterator[pa.RecordBatch]:
    """Read row groups of an open file in batches.

    Args:
      file: the file.
      path: its name, for the error.
      row_groups: which row groups, ascending.
      columns: columns to read.
      batch_rows: most rows in a batch; a batch also has at most about `BATCH_BYTES` bytes.

    Yields:
      Record batches, in row order.

    Raises:
      DamagedFileError: the file is damaged.
    """
    bounded = min(batch_rows, max(1, BATCH_BYTES // _row_bytes(file.metadata, row_groups, columns)))
    try:
        yield from file.iter_batches(
            batch_size=bounded, row_groups=list(row_groups), columns=list(columns), use_threads=False
        )
    except StoreError:
        raise
    except (pa.ArrowException, OSError) as e:
        raise DamagedFileError(f"{path} is damaged ({first_line(e)}); write it again or take it out of the pool") from e


def answered_rows(batch_rows: int, num_classes: int) -> int:
    """Return how many of `batch_rows` rows to work on at a time, so that float32 answers take at most `ANSWER_BYTES`."""
    return min(batch_rows, max(1, ANSWER_BYTES // (4 * num_classes)))


def _row_bytes(metadata: pq.FileMetaData, row_groups: Sequence[int], columns: Sequence[str]) -> int:
    """Estimate the bytes of a row from the first of the row groups."""
    group = metadata.row_group(row_groups[0])
    wanted = set(columns)
    chunks = (group.column(i) for i in range(group.num_columns))
    size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.partition(".")[0] in wanted)
    return max(1, int(size) // max(1, int(group.num_rows)))
