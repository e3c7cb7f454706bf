"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from distilbeam.storage.paths import is_remote, upload


@contextlib.contextmanager
def replacing(path: Path, *, flushed: bool = True) -> Iterator[Path]:
    """Give a temporary file to write and move it to `path` when the block ends without an error.

    The file is flushed to the disk before the rename and the folder after it, so that the name never leads to half a
    file, after a crash of the machine either. Writers in any number of processes on one filesystem may use the same
    path: the last rename wins and each of them is whole. In an object store the file is uploaded instead, and the last
    upload wins.

    Args:
      path: the final name; its folder is made where it is missing.
      flushed: whether to flush. A file that is not outlives a killed process, but not a crash of the machine.

    Yields:
      A name in the same folder that begins with a dot, which readers of the folder pass over; for an object store one
      among the system's temporary files.

    Raises:
      StoreError: an object store did not take the file.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="distilbeam-upload-") as folder:
            yield Path(folder) / path.name
            upload(Path(folder) / path.name, path)
        return
    temporary = temporary_name(path)
    try:
        yield temporary
        if flushed:
            move_flushed({temporary: path})
        else:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` that nobody else uses and readers pass over; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def move_flushed(moves: Mapping[Path, Path]) -> None:
    """Flush files to the disk, give them their final names, then flush the folders, each once.

    Args:
      moves: final names by temporary ones, each in the folder of its final one.
    """
    for temporary in moves:
        flush(temporary)
    for temporary, path in moves.items():
        temporary.replace(path)
    for folder in {path.parent for path in moves.values()}:
        flush(folder)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
