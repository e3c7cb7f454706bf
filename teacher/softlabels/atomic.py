"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file to write and move it to `path` when the block ends without an error.

    The file is flushed to the disk before the rename and the folder after it, so that the name never leads to half a
    file, after a crash of the machine either. Writers in any number of processes on one filesystem may use the same
    path: the last rename wins and each of them is whole.

    Args:
      path: the final name; its folder is made where it is missing.

    Yields:
      A name in the same folder that begins with a dot, which readers of the folder pass over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
