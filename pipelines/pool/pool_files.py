"""The Parquet files of a pool: which there are, what they are called, their footers.

A file is known by its name below the pool's root and by the BLAKE2b hash of its footer, which holds the sizes, offsets and
statistics of every column chunk. Hidden files of a directory are passed over.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.pool.object_store import is_hidden, list_pool, metadata_of, read_footers
from distilbeam.storage.paths import StoreError, to_path
from distilbeam.storage.stores import store_of


@dataclass(frozen=True)
class PoolFile:
    """A file as it is planned: its name relative to the pool's root, where it is, its footer, a hash of that, its state."""

    name: str
    path: str
    metadata: pq.FileMetaData
    digest: str
    state: tuple[Any, ...]


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


def open_parquet(path: str | Path, what: str = "pool") -> pq.ParquetFile:
    """Open a Parquet file, or say in a sentence why it cannot be."""
    try:
        return store_of(path).open_parquet(to_path(path))
    except FileNotFoundError as e:
        raise ValueError(f"{what}: no such file: {path}") from e
    except StoreError:
        raise
    except (pa.ArrowInvalid, OSError) as e:
        raise _not_parquet(what, path, first_line(e)) from e


def file_on_disk(path: Path, root: Path, what: str) -> PoolFile:
    state = store_of(path).identity(path) if path.exists() else ()
    metadata = open_parquet(path, what).metadata
    with path.open("rb") as f:
        size = f.seek(-8, os.SEEK_END) + 8
        length = int.from_bytes(f.read(4), "little")
        f.seek(-8 - length, os.SEEK_END)
        digest = _digest(f.read(length), size)
    full = path.resolve()
    return PoolFile(str(full.relative_to(root)), str(full), metadata, digest, state)


def files_in_store(where: Path, what: str) -> Iterator[PoolFile]:
    files = list_pool(where)
    if not files:
        raise _nothing(what, where)
    for file, footer in read_footers(files):
        try:
            metadata = metadata_of(footer)
        except (pa.ArrowException, OSError) as e:
            raise _not_parquet(
                what, file.path, first_line(e) if footer else "it does not end as Parquet files do"
            ) from e
        yield PoolFile(
            file.name, str(file.path), metadata, _digest(footer, file.bytes), (file.bytes, str(file.version))
        )


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _digest(footer: bytes, size: int) -> str:
    return hashlib.blake2b(footer + str(size).encode(), digest_size=16).hexdigest()


def _nothing(what: str, where: str | Path) -> ValueError:
    return ValueError(f"{what} must name Parquet files, a directory of them or a glob pattern; nothing is at {where}")


def _not_parquet(what: str, path: str | Path, reason: str) -> ValueError:
    return ValueError(f"{what}: {path} cannot be read as Parquet ({reason}); write it again or take it out")


def _fixed(pattern: Path) -> Path:
    """Return the part of a glob pattern before the first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts[:-1]))
