"""Splits of the pool, called units: the pieces that workers take.

A unit is a Parquet file and a range of its row groups, with an id: the BLAKE2b hash of the file's footer (which holds the
sizes, offsets and statistics of every column chunk), its name and the row range. Planning reads footers only. Everything
downstream is keyed by unit: what a worker commits, the generator that rounds its marginals, what a resumed job still has to
do. A footer may stay the same when values change; whether they did is the business of `contents` (labelling jobs) and
`content_digests` (runs), and a file that is replaced while a job reads it is found by its state.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.pool.object_store import is_hidden, list_pool, metadata_of, read_footers
from distilbeam.pipelines.pool.pool_types import cast_batches, common_type
from distilbeam.storage.paths import StoreError, is_remote, to_path
from distilbeam.storage.stores import store_of

BATCH_BYTES = 16 * 2**20  # of a batch that is worked on; a few of them are held at a time
ANSWER_BYTES = 64 * 2**20  # of a model's answers to a batch


class DamagedFileError(ValueError):
    """A file of the pool cannot be read to its end."""


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


@dataclass(frozen=True)
class _PoolFile:
    """A file as it is planned: its name relative to the pool's root, where it is, its footer, a hash of that, its state."""

    name: str
    path: str
    metadata: pq.FileMetaData
    digest: str
    state: tuple[Any, ...]


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
    return _planned(_in_store(where, what), target_rows, what, columns)


def find_files(pattern: str | Path, what: str = "pool") -> list[Path]:
    """List the Parquet files that a path, a directory or a glob pattern names, sorted.

    Hidden ones of a directory, of which a part of the path below it begins with `.` or `_`, are passed over: tables in
    lakes keep their logs so, and writers what is not whole yet.

    Raises:
      ValueError: nothing is there.
    """
    path = Path(pattern)
    if path.is_dir():
        found = [p for p in path.rglob("*.parquet") if not is_hidden(p.relative_to(path).as_posix())]
    elif path.exists():
        found = [path]
    else:
        root, literal = _fixed(path), set(path.parts)  # a part that the pattern spells out is wanted
        matched = (Path(p) for p in glob.glob(str(pattern), recursive=True))  # noqa: PTH207  # absolute patterns
        found = [p for p in matched if not is_hidden("/".join(set(p.relative_to(root).parts) - literal))]
        found = [p for p in found if p.is_file()]
    if not found:
        raise _nothing(what, pattern)
    return sorted(found)


def root_of(pattern: str | Path) -> Path:
    """Return the directory that the names of a pool's files are relative to: it does not depend on which files are there."""
    path = Path(pattern)
    if path.is_dir():
        return path.resolve()
    return _fixed(path).resolve()


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
    return _planned((_on_disk(path, root, what) for path in files), target_rows, what, columns)


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


def open_parquet(path: str | Path, what: str = "pool") -> pq.ParquetFile:
    """Open a Parquet file, or say in a sentence why it cannot be."""
    try:
        return store_of(path).open_parquet(to_path(path))
    except FileNotFoundError as e:
        raise ValueError(f"{what}: no such file: {path}") from e
    except StoreError:
        raise
    except (pa.ArrowInvalid, OSError) as e:
        raise _not_parquet(what, path, _first_line(e)) from e


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
        raise DamagedFileError(
            f"{path} is damaged ({_first_line(e)}); write it again or take it out of the pool"
        ) from e


def answered_rows(batch_rows: int, num_classes: int) -> int:
    """Return how many of `batch_rows` rows to work on at a time, so that float32 answers take at most `ANSWER_BYTES`."""
    return min(batch_rows, max(1, ANSWER_BYTES // (4 * num_classes)))


def _planned(files: Iterable[_PoolFile], target_rows: int, what: str, columns: Iterable[str] | None) -> Pool:
    planned = list(files)
    names, types = _types(planned, what, columns)
    units: list[Unit] = []
    pool_row = 0
    for file in planned:
        casts, chunks = _casts(file, types), _chunks(file.metadata, types)
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


def _types(
    files: Sequence[_PoolFile], what: str, columns: Iterable[str] | None
) -> tuple[tuple[str, ...], dict[str, pa.DataType]]:
    """Find the columns of the first file that has rows, and the types of those that are read."""
    first: pa.Schema | None = None
    read: tuple[str, ...] = ()
    types: dict[str, pa.DataType] = {}
    for file in files:
        if not file.metadata.num_rows:
            continue
        schema = file.metadata.schema.to_arrow_schema()
        if first is None:
            first, read = schema, tuple(schema.names) if columns is None else tuple(dict.fromkeys(columns))
        if columns is None:
            _require_same(first, schema, file.path, what)
        for name in read:
            if name in schema.names:
                types[name] = _common(types.get(name), schema.field(name).type, name, file.path, what)
            elif name in first.names:
                raise ValueError(
                    f"{what}: {file.path} has no column {name}, which is read and other files have; write it again with "
                    "it, or take it out"
                )
    return (() if first is None else tuple(first.names)), types


def _common(so_far: pa.DataType | None, found: pa.DataType, name: str, path: str, what: str) -> pa.DataType:
    common = found if so_far is None else common_type(so_far, found)
    if common is None:
        raise ValueError(
            f"{what}: {path} differs from the files before it in column(s) {name}, which is {found} there and {so_far} in "
            "them; write it again with one type"
        )
    return common


def _require_same(first: pa.Schema, schema: pa.Schema, path: str, what: str) -> None:
    expected, found = ({field.name: field.type for field in s} for s in (first, schema))
    if differing := {name for name, _ in expected.items() ^ found.items()}:
        raise ValueError(
            f"{what}: {path} differs from the first file in column(s) {', '.join(sorted(differing))}; all files must have "
            "one schema"
        )


def _casts(file: _PoolFile, types: dict[str, pa.DataType]) -> tuple[tuple[str, pa.DataType], ...]:
    schema = file.metadata.schema.to_arrow_schema()
    return tuple(
        (name, kind) for name, kind in types.items() if name in schema.names and schema.field(name).type != kind
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


def _on_disk(path: Path, root: Path, what: str) -> _PoolFile:
    state = store_of(path).identity(path) if path.exists() else ()
    metadata = open_parquet(path, what).metadata
    with path.open("rb") as f:
        size = f.seek(-8, os.SEEK_END) + 8
        length = int.from_bytes(f.read(4), "little")
        f.seek(-8 - length, os.SEEK_END)
        digest = _digest(f.read(length), size)
    full = path.resolve()
    return _PoolFile(str(full.relative_to(root)), str(full), metadata, digest, state)


def _in_store(where: Path, what: str) -> Iterator[_PoolFile]:
    files = list_pool(where)
    if not files:
        raise _nothing(what, where)
    for file, footer in read_footers(files):
        try:
            metadata = metadata_of(footer)
        except (pa.ArrowException, OSError) as e:
            raise _not_parquet(
                what, file.path, _first_line(e) if footer else "it does not end as Parquet files do"
            ) from e
        yield _PoolFile(
            file.name, str(file.path), metadata, _digest(footer, file.bytes), (file.bytes, str(file.version))
        )


def _digest(footer: bytes, size: int) -> str:
    return hashlib.blake2b(footer + str(size).encode(), digest_size=16).hexdigest()


def _nothing(what: str, where: str | Path) -> ValueError:
    return ValueError(f"{what} must name Parquet files, a directory of them or a glob pattern; nothing is at {where}")


def _not_parquet(what: str, path: str | Path, reason: str) -> ValueError:
    return ValueError(f"{what}: {path} cannot be read as Parquet ({reason}); write it again or take it out")


def _row_bytes(metadata: pq.FileMetaData, row_groups: Sequence[int], columns: Sequence[str]) -> int:
    """Estimate the bytes of a row from the first of the row groups."""
    group = metadata.row_group(row_groups[0])
    wanted = set(columns)
    chunks = (group.column(i) for i in range(group.num_columns))
    size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.partition(".")[0] in wanted)
    return max(1, int(size) // max(1, int(group.num_rows)))


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


def _fixed(pattern: Path) -> Path:
    """Return the part of a glob pattern before the first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1]))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
