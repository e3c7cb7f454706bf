"""Paths of files: on a file system, or in an object store that a URL such as `gs://bucket/folder` names.

A file system's places are `pathlib.Path`; an object store's are `upath.UPath`, which has the same methods over fsspec and
is loaded only when a URL is met. Credentials are the business of the store's own package (environment variables,
instance metadata); nothing of them stands in a configuration.

An object store has no folders and no rename, but an object appears whole or not at all, and a listing holds it as soon as
its upload has ended (S3 and Google Cloud Storage both promise that). A request takes tens of milliseconds, so that
what is wanted of many objects is asked at once.
"""

from __future__ import annotations

import fnmatch
import io
import os
import posixpath
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcp", "gcs": "gcp"}


class StoreError(OSError):
    """An object store did not do what it was asked to; trying again may help."""


def is_remote(place: str | Path) -> bool:
    """Tell whether a place is in an object store."""
    return "://" in place if isinstance(place, str) else not isinstance(place, Path)


def to_path(place: str | Path) -> Path:
    """Turn text into a path.

    Args:
      place: a path of the file system, or a URL of a store that fsspec has a package for; or such a path.

    Returns:
      A `pathlib.Path`; for a URL a `upath.UPath`, which keeps no listings, since other processes write there too.

    Raises:
      ValueError: the store's package is not installed, or there is none.
    """
    if isinstance(place, str) and is_remote(place):
        return _remote_path(place)
    return Path(place) if isinstance(place, (str, os.PathLike)) else _without_listings(place)


def joined(directory: Path, relative: str) -> Path:
    """Return the file that a path relative to a folder leads to; an object store knows no `..`."""
    path = directory / relative
    return path.resolve() if is_remote(path) and ".." in path.parts else path


def readable(path: Path) -> Any:
    """Return what pyarrow opens a file with: its path, or an open file of an object store that reads just what is asked."""
    return _RemoteFile(path) if is_remote(path) else path


@contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """Give a file as one of the file system until the block ends: itself, or a copy of an object.

    Raises:
      FileNotFoundError: it is not there.
      StoreError: the store did not give it.
    """
    if not is_remote(path):
        yield path
        return
    store: Any = path
    with tempfile.TemporaryDirectory(prefix="distilbeam-download-") as folder:
        copy = Path(folder) / path.name
        with asking_store(f"{path} could not be read"):
            store.fs.get_file(store.path, str(copy))
        yield copy


def list_files(folder: Path, pattern: str = "*") -> list[Path]:
    """List the files of a folder whose names fit a pattern; a folder that is not there has none.

    Raises:
      StoreError: an object store did not give the listing.
    """
    if not is_remote(folder):
        return list(folder.glob(pattern))
    store: Any = folder
    with asking_store(f"{folder} could not be listed"):
        names = [posixpath.relpath(name, store.path) for name in store.fs.find(store.path)]
    return [folder / name for name in names if "/" not in name and fnmatch.fnmatchcase(name, pattern)]


def upload(file: Path, target: Path) -> None:
    """Copy a local file to an object, which appears whole or not at all.

    Raises:
      StoreError: the store did not take it.
    """
    fs: Any = cast("Any", target).fs
    with asking_store(f"{target} could not be written"):
        fs.put_file(str(file), cast("Any", target).path)


def read_texts(files: Sequence[Path]) -> list[str]:
    """Read small files; those of an object store all at once.

    Raises:
      FileNotFoundError: one of them is not there.
      StoreError: the store did not give one of them.
    """
    if not files or not is_remote(files[0]):
        return [file.read_text() for file in files]
    return [data.decode() for data in read_ranges(files, [(0, None)] * len(files))]


def read_bytes(file: Path) -> bytes:
    """Read a file whole.

    Raises:
      FileNotFoundError: it is not there.
      StoreError: the store did not give it.
    """
    return read_ranges([file], [(0, None)])[0] if is_remote(file) else file.read_bytes()


def read_ranges(files: Sequence[Path], ranges: Sequence[tuple[int, int | None]]) -> list[bytes]:
    """Read a range of bytes of each of some objects that are not empty, all at once.

    Raises:
      FileNotFoundError: one of them is not there.
      StoreError: the store did not give one of them.
    """
    remote: Any = files
    starts, stops = (list(edges) for edges in zip(*ranges, strict=True))
    found = remote[0].fs.cat_ranges([file.path for file in remote], starts, stops, on_error="return")
    for file, data in zip(files, found, strict=True):
        with asking_store(f"{file} could not be read"):
            if isinstance(data, Exception):
                raise data
    return [bytes(data) for data in found]


def remove_files(files: Sequence[Path]) -> None:
    """Remove files; those of an object store at once. One that is not there is passed over.

    Raises:
      StoreError: the store did not remove one of them.
    """
    if not files or not is_remote(files[0]):
        for file in files:
            file.unlink(missing_ok=True)
        return
    remote: Any = files
    with asking_store(f"{files[0].parent} could not be changed"):
        try:
            remote[0].fs.rm([file.path for file in remote])
        except FileNotFoundError:  # some are gone: one by one
            for file in remote:
                file.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder and all that is in it, if it is there.

    Raises:
      StoreError: an object store did not remove it.
    """
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    store: Any = folder
    with asking_store(f"{folder} could not be removed"), suppress(FileNotFoundError):
        store.fs.rm(store.path, recursive=True)


def identities(files: Sequence[Path]) -> dict[Path, Any]:
    """Find what tells each file from one that replaces it; those that are gone are left out.

    Args:
      files: files of one folder; a store is asked for its listing once.
    """
    if not files or not is_remote(files[0]):
        stats = ((file, _stat(file)) for file in files)
        return {file: (stat.st_ino, stat.st_mtime_ns) for file, stat in stats if stat is not None}
    folder: Any = files[0].parent
    with asking_store(f"{folder} could not be listed"):
        listed = {
            info["name"].rpartition("/")[2]: object_version(info) for info in folder.fs.ls(folder.path, detail=True)
        }
    return {file: listed[file.name] for file in files if file.name in listed}


def object_identity(path: Path) -> tuple[Any, int]:
    """Return an object's version and its size in bytes.

    Raises:
      FileNotFoundError: it is not there.
      StoreError: the store did not tell.
    """
    store: Any = path
    with asking_store(f"{path} could not be read"):
        info = store.fs.info(store.path)
    return object_version(info), int(info["size"])


@contextmanager
def asking_store(failed: str) -> Iterator[None]:
    """Turn whatever a store's package raises into a `StoreError` that begins with `failed`; what is missing stays missing."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, StoreError):
        raise
    except Exception as e:  # each package has errors of its own
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise StoreError(f"{failed}: {reason}") from e


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except FileNotFoundError:
        return None


def object_version(info: dict[str, Any]) -> Any:
    """Return the version that a store gives an object; its size and time where it gives none."""
    named = (info.get(name) for name in ("generation", "ETag", "etag"))
    return next(
        (value for value in named if value), (info.get("size"), str(info.get("LastModified", info.get("mtime"))))
    )


def _remote_path(url: str) -> Path:
    protocol = url.partition("://")[0]
    extra = _EXTRAS.get(protocol)
    package = (
        f"pip install 'distilbeam[{extra}]'" if extra else "pip install universal_pathlib and fsspec's package for it"
    )
    try:
        import fsspec
        from upath import UPath

        fsspec.get_filesystem_class(protocol)
    except ImportError as e:
        raise ValueError(f"{url} needs packages that are not installed ({e.name or e}): {package}") from e
    except ValueError as e:
        raise ValueError(f"{url} names no object store that fsspec knows; take s3:// or gs://, or a path") from e
    return cast("Path", UPath(url, use_listings_cache=False))


def _without_listings(path: Any) -> Path:
    if path.storage_options.get("use_listings_cache") is not False:
        path = type(path)(str(path), **{**path.storage_options, "use_listings_cache": False})
    return cast("Path", path)


class _RemoteFile(io.RawIOBase):
    """An object as a file; a read is a request for just these bytes."""

    def __init__(self, path: Any) -> None:
        self._path, self._fs, self._position = path, path.fs, 0
        with asking_store(f"{path} could not be read"):
            self._size = int(self._fs.size(path.path))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        start = self._position
        stop = self._size if size is None or size < 0 else min(start + size, self._size)
        if stop <= start:
            return b""
        with asking_store(f"{self._path} could not be read"):
            data = bytes(self._fs.cat_file(self._path.path, start=start, end=stop))
        if len(data) != stop - start:
            raise StoreError(
                f"{self._path} changed while it was read: {stop - start:,} bytes wanted, {len(data):,} given"
            )
        self._position = stop
        return data
