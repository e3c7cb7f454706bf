"""What is flushed to the disk before and after a folder has its name, and a process that is killed at a flush."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock


def flushes_of(work: Callable[[], object], target: Path) -> tuple[set[str], list[Path]]:
    """Do some work that ends with the rename of a folder to `target`.

    Returns:
      What was flushed under the temporary name, relative to it, and what was flushed after the rename.
    """
    flushed: list[Path] = []
    renamed_at: list[tuple[int, Path]] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def noted_replace(source: Path, to: Path) -> Path:
        if Path(to) == target:
            renamed_at.append((len(flushed), source))
        return replace(source, to)

    with mock.patch.object(os, "fsync", noted_fsync), mock.patch.object(Path, "replace", noted_replace):
        work()
    ((count, temporary),) = renamed_at
    inside = [path for path in flushed[:count] if path.is_relative_to(temporary)]
    return {"" if path == temporary else str(path.relative_to(temporary)) for path in inside}, flushed[count:]


def die_at_flush(number: int) -> None:
    """Let this process be killed when it is about to flush for the `number`-th time."""
    count, fsync = 0, os.fsync

    def deadly(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = deadly


def killed_at_flush(work: Callable[[], object], number: int) -> int:
    """Do some work in a child that is killed when it is about to flush for the `number`-th time; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            die_at_flush(number)
            work()
        except BaseException:  # noqa: BLE001 - the child ends here, whatever it was
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]
