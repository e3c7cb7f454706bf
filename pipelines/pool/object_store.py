"""A pool in an object store: its files from one listing, their footers asked for all at once."""

from __future__ import annotations

import glob
import itertools
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.storage.paths import asking_store, object_version, read_ranges

_TAIL_BYTES = 64 * 2**10  # the last part of a file, in which most footers are whole
_ENDING = 8  # length of the footer and the magic number


@dataclass(frozen=True)
class PoolObject:
    """A Parquet file of a pool.

    Attributes:
      path: where it is.
      name: its name relative to the pool's root.
      bytes: its size.
      version: what tells it from an object that replaces it.
    """

    path: Path
    name: str
    bytes: int
    version: Any = None


def list_pool(where: Path) -> list[PoolObject]:
    """List the Parquet files that an object, a folder or a glob pattern names, sorted by path; empty files too.

    Raises:
      StoreError: the store did not give the listing.
    """
    store: Any = where
    with asking_store(f"{where} could not be listed"):
        try:
            found = _found(store.fs, store.path)
        except FileNotFoundError:  # no such bucket
            return []
    root = _root(store.path, found)
    return [
        PoolObject(_path_of(store, name), posixpath.relpath(name, root), int(info["size"]), object_version(info))
        for name, info in sorted(found.items())
    ]


def read_footers(files: Sequence[PoolObject]) -> Iterator[tuple[PoolObject, bytes]]:
    """Read the footers of files: the bytes between the last row group and the length.

    Yields:
      A file with its footer, in their order; with nothing where the file is not Parquet.

    Raises:
      FileNotFoundError: a file is gone.
      StoreError: the store did not give one of them.
    """
    if not files:
        return
    tails = _last_bytes(files, [_TAIL_BYTES] * len(files))
    lengths = [_footer_bytes(tail) for tail in tails]
    long = [i for i, (tail, length) in enumerate(zip(tails, lengths, strict=True)) if len(tail) < length + _ENDING]
    long = [i for i in long if files[i].bytes >= lengths[i] + _ENDING]
    again = _last_bytes([files[i] for i in long], [lengths[i] + _ENDING for i in long]) if long else []
    for i, tail in zip(long, again, strict=True):
        tails[i] = tail
    for file, tail, length in zip(files, tails, lengths, strict=True):
        yield file, tail[-_ENDING - length : -_ENDING] if length and len(tail) >= length + _ENDING else b""


def metadata_of(footer: bytes) -> pq.FileMetaData:
    """Parse a footer.

    Raises:
      pyarrow.ArrowException: it is not one.
    """
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"))


def _found(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    if glob.has_magic(path):
        root, literal = _root(path, {}), set(path.split("/"))
        found = {
            name: info
            for name, info in fs.glob(path, detail=True).items()
            if not is_hidden("/".join(set(posixpath.relpath(name, root).split("/")) - literal))
        }
    else:
        found = fs.find(path, detail=True)
        if path in found:
            return {path: found[path]}
        found = {
            name: info
            for name, info in found.items()
            if name.endswith(".parquet") and not is_hidden(posixpath.relpath(name, path))
        }
    return {name: info for name, info in found.items() if info["type"] == "file"}


def is_hidden(name: str) -> bool:
    """Tell whether a part of a file's name relative to the pool begins with a dot or an underscore."""
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _root(path: str, found: dict[str, Any]) -> str:
    """Return what the names are relative to, as `splits.root_of` does on a file system."""
    if glob.has_magic(path) or path in found:
        return "/".join(itertools.takewhile(lambda part: not glob.has_magic(part), path.split("/")[:-1]))
    return path


def _path_of(store: Any, name: str) -> Path:
    path: Path = type(store)(f"{store.protocol}://{name}", **store.storage_options)
    return path


def _last_bytes(files: Sequence[PoolObject], counts: Sequence[int]) -> list[bytes]:
    ranges = [(max(0, file.bytes - count), file.bytes) for file, count in zip(files, counts, strict=True)]
    return read_ranges([file.path for file in files], ranges)


def _footer_bytes(tail: bytes) -> int:
    """Return the footer's length, 0 where the file does not end like a Parquet file."""
    return int.from_bytes(tail[-_ENDING:-4], "little") if len(tail) >= _ENDING and tail.endswith(b"PAR1") else 0
