"""Files and folders that appear whole or not at all: written under a temporary name, flushed to the disk, renamed.

Temporary names begin with a dot and end in `.tmp`, with a random part between, so that two writers of one file never share
one; what a killed process left behind is swept when its run is opened again (`files.sweep`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
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


@contextlib.contextmanager
def committed_directory(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill and move it to `path` when the block ends without an error.

    Every file and folder in it is flushed before the rename and the folder around it after, as by `replacing`.

    Args:
      path: the final name, of a folder that is not there, or is empty; the folder around it is made where it is missing.

    Yields:
      A new folder beside `path`, whose name begins with a dot.
    """
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for inside in temporary.rglob("*"):
            flush(inside)
        move_flushed({temporary: path})  # which takes the place of an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """Return a name beside `path` that nobody else uses and readers pass over; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def move_flushed(moves: Mapping[Path, Path]) -> None:
    """Flush files, or folders, to the disk, give them their final names, then flush the folders around them, each once.

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
