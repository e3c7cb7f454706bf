"""Folders among the system's temporary files that nobody else can read or replace, and removing those of killed processes.

A folder that others can guess is made by them before, as a link to where they want our files. Folders with a name of chance
(`private_folder`) cannot be guessed; those that must be found again (`own_folder`) are used only where they are a folder
and no link, are ours, and are closed to others.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PREFIX = "distilbeam-"
_PROCESS = ".process"  # the file that says whose folder it is
_OLD_S = 24 * 3600.0
_UNCLAIMED = tuple(f"{PREFIX}{purpose}-" for purpose in ("upload", "download", "plan", "deploy"))


@contextmanager
def private_folder(purpose: str) -> Iterator[Path]:
    """Give a new folder among the temporary files until the block ends; a killed process's is removed by `remove_left`."""
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}-"))
    claim(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def claim(folder: Path) -> None:
    """Write down that a folder belongs to this process."""
    (folder / _PROCESS).write_text(f"{os.getpid()} {psutil.Process().create_time():.3f}\n")


def own_folder(name: str, *, make: bool) -> Path | None:
    """Return the user's folder of a name among the temporary files.

    Args:
      name: what it is for.
      make: whether to make it where it is missing.

    Returns:
      The folder; None where it is missing, a link, somebody else's, or open to others.
    """
    folder = Path(tempfile.gettempdir()) / f"{PREFIX}{name}-{os.getuid()}"
    if make:
        with suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
    return folder if is_private(folder) else None


def is_private(folder: Path) -> bool:
    """Tell whether a path is a folder and no link, is this user's, and is closed to others."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not stat.S_IMODE(found.st_mode) & 0o077


def remove_left() -> int:
    """Remove this user's folders whose process is gone; return how many there were."""
    count = 0
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if is_private(folder) and _is_left(folder):
            shutil.rmtree(folder, ignore_errors=True)
            count += 1
    return count


def _is_left(folder: Path) -> bool:
    try:
        process, started = (folder / _PROCESS).read_text().split()
        return bool(abs(psutil.Process(int(process)).create_time() - float(started)) > 1)
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError, psutil.Error):  # of those that say not whose they are, old ones
        return folder.name.startswith(_UNCLAIMED) and _age_s(folder) > _OLD_S


def _age_s(folder: Path) -> float:
    try:
        return time.time() - folder.stat().st_mtime
    except OSError:
        return 0.0
