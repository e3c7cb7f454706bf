"""The two kinds of store, a file system and an object store: what they do differently behind one set of methods.

    store_of(place).identity(path)

Whoever has a place asks its store, and not which of the two it is in. What both can do by other means (listing, reading,
removing) are functions of `paths`; files and folders that appear whole or not at all are those of `atomic`.
"""

from __future__ import annotations

import fcntl
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq

from distilbeam.storage.files import read_json, write_json
from distilbeam.storage.lease import leased
from distilbeam.storage.paths import asking_store, is_remote, object_identity, readable, remove_files, to_path

_MOVE = "moving.json"


class Store(ABC):
    """Where files are.

    Attributes:
      by_request: whether every look and every read is a request, which takes time and costs money.
      look_s: seconds to let pass between two looks at what others have written.
    """

    by_request: bool
    look_s: float

    @abstractmethod
    def identity(self, path: Path) -> tuple[Any, ...]:
        """Return what tells a file from one that replaces it, its size in bytes first.

        Raises:
          FileNotFoundError: it is not there.
          StoreError: the store did not tell.
        """

    @abstractmethod
    def open_parquet(self, path: Path, *, metadata: Any = None, mapped: bool = False) -> pq.ParquetFile:
        """Open a Parquet file whose pages' checksums are verified.

        Args:
          path: the file.
          metadata: its footer, where it was read already.
          mapped: map the file into memory, where that can be.
        """

    @abstractmethod
    def make_folder(self, folder: Path) -> None:
        """Make a folder where it is missing."""

    @abstractmethod
    def move_folder(self, source: Path, target: Path, root: Path) -> None:
        """Move a folder to a name that is free.

        Args:
          source: the folder.
          target: its new name.
          root: a folder around both, which this process holds.
        """

    @abstractmethod
    def finish_move(self, root: Path) -> None:
        """Finish the move that a killed process has begun, if there is one; `root` is held by this process."""

    @abstractmethod
    def hold(self, root: Path, setting: str, way_out: str) -> AbstractContextManager[None]:
        """Make a folder and hold it against other processes until the block ends.

        Args:
          root: the folder.
          setting: what named it, for errors.
          way_out: the words with which another folder is chosen.

        Raises:
          ValueError: it cannot be written, or another process holds it.
        """


class FileSystem(Store):
    """A file system: a folder moves by one rename, a lock ends with its process."""

    by_request = False
    look_s = 0.2

    def identity(self, path: Path) -> tuple[Any, ...]:
        """Return size, time of change in ns, inode and machine."""
        state = path.stat()
        return state.st_size, state.st_mtime_ns, state.st_ino, os.uname().nodename

    def open_parquet(self, path: Path, *, metadata: Any = None, mapped: bool = False) -> pq.ParquetFile:
        return pq.ParquetFile(path, metadata=metadata, memory_map=mapped, page_checksum_verification=True)

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def move_folder(self, source: Path, target: Path, root: Path) -> None:  # noqa: ARG002
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)

    def finish_move(self, root: Path) -> None:
        pass

    @contextmanager
    def hold(self, root: Path, setting: str, way_out: str) -> Iterator[None]:
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = (root / ".lock").open("a+")
        except OSError as e:
            raise ValueError(
                f"{setting}: {root} cannot be written ({e.strerror}); choose another with {way_out}"
            ) from e
        with lock:
            _lock(lock, root, setting)
            yield


class ObjectStore(Store):
    """A bucket: no folders, no rename and no locks, but objects that appear whole."""

    by_request = True
    look_s = 5.0

    def identity(self, path: Path) -> tuple[Any, ...]:
        """Return size and version."""
        version, size = object_identity(path)
        return size, str(version)

    def open_parquet(self, path: Path, *, metadata: Any = None, mapped: bool = False) -> pq.ParquetFile:  # noqa: ARG002
        # the chunks of a row group are fetched together
        return pq.ParquetFile(readable(path), metadata=metadata, pre_buffer=True, page_checksum_verification=True)

    def make_folder(self, folder: Path) -> None:
        pass

    def move_folder(self, source: Path, target: Path, root: Path) -> None:
        """Copy and remove, by a journal that is written before the first copy and removed after the last removal."""
        write_json(root / _MOVE, {"source": str(source), "target": str(target)})
        self.finish_move(root)

    def finish_move(self, root: Path) -> None:
        if not (root / _MOVE).exists():
            return
        journal = read_json(root / _MOVE)
        source: Any = to_path(journal["source"])
        target: Any = to_path(journal["target"])
        with asking_store(f"{source} could not be moved to {target}"):
            names = source.fs.find(source.path)
            copies = [target.path + name.removeprefix(source.path) for name in names]
            if names:
                source.fs.copy(names, copies)
        remove_files([type(source)(f"{source.protocol}://{name}", **source.storage_options) for name in names])
        remove_files([root / _MOVE])

    def hold(self, root: Path, setting: str, way_out: str) -> AbstractContextManager[None]:
        """Hold the folder by a lease; see `lease`."""
        return leased(root, setting, way_out)


_FILE_SYSTEM, _OBJECT_STORE = FileSystem(), ObjectStore()


def store_of(place: str | Path) -> Store:
    """Return the store that a place is in."""
    return _OBJECT_STORE if is_remote(place) else _FILE_SYSTEM


def _lock(lock: IO[str], root: Path, setting: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        raise ValueError(
            f"{root} is being worked on by {holder}; wait for it to end or choose another {setting}"
        ) from e
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}")
    lock.flush()
