"""Splits of the pool, called units: the pieces that workers take.

A unit is a Parquet file and a range of its row groups, with an id: the BLAKE2b hash of the file's footer (which holds the
sizes, offsets and statistics of every column chunk), its name and the row range. Planning reads footers only. Everything
downstream is keyed by unit: what a worker commits, the generator that rounds its marginals, what a resumed job still has to
do. A footer may stay the same when values change; whether they did is the business of `contents` (labelling jobs) and
`content_digests` (runs), and a file that is replaced while a job reads it is found by its state.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.pool.pool_files import PoolFile, file_on_disk, files_in_store, find_files, root_of
from distilbeam.pipelines.pool.pool_types import casts_of, columns_and_types
from distilbeam.storage.paths import is_remote


@dataclass(frozen=True)
class Unit:
    """A range of row groups of one Parquet file.

    Attributes:
      uid: stable id, 16 hexadecimal digits.
      path: the file.
      row_groups: first row group and the one after the last.
      first_row: row of the file at which the unit starts.
      pool_row: row of the whole pool, in planned order, at which the unit starts.
      rows: number of rows, at least 1.
      sizes: rows of each of its row groups.
      widths: bytes that a row takes in each column that is read, as the footer has them.
      casts: columns that are read and have another type in this file than in the pool, with the pool's.
      state: what tells the file from one that replaces it, see `Store.identity`; None where nobody looked.
    """

    uid: str
    path: str
    row_groups: tuple[int, int]
    first_row: int
    pool_row: int
    rows: int
    sizes: tuple[int, ...]
    widths: tuple[tuple[str, int], ...] = field(default=(), compare=False)
    casts: tuple[tuple[str, pa.DataType], ...] = field(default=(), compare=False)
    state: tuple[Any, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Pool:
    """The frozen plan of a set of Parquet files: which units there are, in which order.

    Attributes:
      files: (name, footer digest) per file.
      units: in file order, then row order.
      columns: column names of the first file; every file has those that are read.
      types: the types of the columns that are read, which are those of all files together.
      states: what tells each file from one that replaces it, by name; see `Store.identity`.
      paths: where each file is, by name.
    """

    files: tuple[tuple[str, str], ...]
    units: tuple[Unit, ...]
    columns: tuple[str, ...]
    types: tuple[tuple[str, pa.DataType], ...] = ()
    states: tuple[tuple[str, tuple[Any, ...]], ...] = field(default=(), compare=False)
    paths: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def rows(self) -> int:
        """Number of rows in all units."""
        return sum(unit.rows for unit in self.units)

    @property
    def digest(self) -> str:
        """Hash of the unit ids: two pools with one digest have the same content in the same order."""
        return hashlib.blake2b("\n".join(unit.uid for unit in self.units).encode(), digest_size=8).hexdigest()


def plan_pool(where: Path, target_rows: int, what: str = "pool", columns: Iterable[str] | None = None) -> Pool:
    """Plan the files that a path, a directory or a glob pattern names, on a file system or in an object store.

    Args:
      where: the files; see `places.to_path`.
      target_rows: row groups are merged until a unit has this many rows.
      what: the setting to name in errors.
      columns: the columns that are read, of which the files must agree; without it all of them, and on each exactly.

    Returns:
      The plan.

    Raises:
      ValueError: nothing is there, or the files make no pool; see `plan_units`.
      StoreError: an object store cannot be read.
    """
    if not is_remote(where):
        return plan_units(find_files(where, what), target_rows, what, root_of(where), columns)
    return _planned(files_in_store(where, what), target_rows, what, columns)


def plan_units(
    files: Sequence[Path],
    target_rows: int,
    what: str = "pool",
    root: Path | None = None,
    columns: Iterable[str] | None = None,
) -> Pool:
    """Cut files into units of about `target_rows` rows along their row groups.

    Args:
      files: Parquet files of one schema.
      target_rows: row groups are merged until a unit has this many rows.
      what: the setting to name in errors.
      root: directory that the names of the files are relative to; names are part of a unit's id. By default the nearest
        one that holds all of them.
      columns: the columns that are read, of which the files must agree; without it all of them, and on each exactly.

    Returns:
      The plan.

    Raises:
      ValueError: a file that is not Parquet, columns of which the files do not agree, or no rows at all.
    """
    root = root or Path(os.path.commonpath([str(f.parent.resolve()) for f in files]))
    return _planned((file_on_disk(path, root, what) for path in files), target_rows, what, columns)


def _planned(files: Iterable[PoolFile], target_rows: int, what: str, columns: Iterable[str] | None) -> Pool:
    planned = list(files)
    names, types = columns_and_types(planned, what, columns)
    units: list[Unit] = []
    pool_row = 0
    for file in planned:
        casts, chunks = casts_of(file, types), _chunks(file.metadata, types)
        for groups, first_row, sizes in _merge_row_groups(file.metadata, target_rows):
            rows = sum(sizes)
            identity = f"{file.name}|{file.digest}|{first_row}|{rows}"
            uid = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
            widths = _widths(file.metadata, groups, rows, chunks)
            units.append(
                Unit(uid, file.path, groups, first_row, pool_row, rows, sizes, widths, casts, state=file.state)
            )
            pool_row += rows
    if not units:
        raise ValueError(
            f"{what} must have at least one row; its {len(planned)} file(s), the first {planned[0].path}, have none"
        )
    return Pool(
        tuple((file.name, file.digest) for file in planned),
        tuple(units),
        names,
        tuple(types.items()),
        tuple((file.name, file.state) for file in planned),
        tuple((file.name, file.path) for file in planned),
    )


def _chunks(metadata: pq.FileMetaData, columns: Iterable[str]) -> dict[str, list[int]]:
    """List the column chunks of each of some columns, of which one that is nested has several."""
    found: dict[str, list[int]] = {name: [] for name in columns}
    for i in range(metadata.num_columns):
        name = metadata.schema.column(i).path.partition(".")[0]
        if name in found:
            found[name].append(i)
    return found


def _widths(
    metadata: pq.FileMetaData, groups: tuple[int, int], rows: int, chunks: dict[str, list[int]]
) -> tuple[tuple[str, int], ...]:
    sizes = dict.fromkeys(chunks, 0)
    for number in range(*groups):
        group = metadata.row_group(number)
        for name, indices in chunks.items():
            sizes[name] += sum(group.column(i).total_uncompressed_size for i in indices)
    return tuple((name, -(-size // rows)) for name, size in sizes.items())


def _merge_row_groups(
    metadata: pq.FileMetaData, target_rows: int
) -> Iterator[tuple[tuple[int, int], int, tuple[int, ...]]]:
    start = first_row = rows = 0
    sizes: list[int] = []
    for group in range(metadata.num_row_groups):
        sizes.append(metadata.row_group(group).num_rows)
        rows += sizes[-1]
        if rows >= target_rows or group == metadata.num_row_groups - 1:
            if rows:
                yield (start, group + 1), first_row, tuple(sizes)
            start, first_row, rows, sizes = group + 1, first_row + rows, 0, []
