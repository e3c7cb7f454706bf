"""The folders that torchrun makes in the system's temporary folder and leaves there, however it ends.

A training notes the folder of its launcher beside its checkpoints. It removes the folder when it has ended well; one that
was killed is removed by the next start, when its launcher is gone.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import psutil

NOTE = "launcher.json"
PREFIX = "torchelastic_"
VARIABLE = "TORCHELASTIC_ERROR_FILE"  # torchrun's: FOLDER/RUN/attempt_N/RANK/error.json


def own_folder() -> Path | None:
    """Find the folder of the torchrun that started this process; None where none did."""
    file = os.environ.get(VARIABLE)
    return None if not file or len(Path(file).parents) < 4 else _ours(Path(file).parents[3])


def note_folder(directory: Path) -> None:
    """Write down, in a training's directory, which folder its launcher has."""
    folder = own_folder()
    if folder is not None:
        launcher = psutil.Process(os.getppid())
        said = {"folder": str(folder), "pid": launcher.pid, "started": launcher.create_time()}
        (directory / NOTE).write_text(json.dumps(said))


def remove_noted(directory: Path) -> None:
    """Remove the folder that a training noted which was killed; that of a launcher at work is left alone."""
    with suppress(OSError, ValueError, KeyError, TypeError):  # half a note is none
        said = json.loads((directory / NOTE).read_text())
        folder = _ours(Path(said["folder"]))
        if folder is not None and not _runs(int(said["pid"]), float(said["started"])):
            shutil.rmtree(folder, ignore_errors=True)


def remove_own() -> None:
    """Remove the folder of this process's torchrun, at the end of a training that needs it no more."""
    folder = own_folder()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _ours(folder: Path) -> Path | None:
    """Give a folder back if it is one of torchrun's, and this user's."""
    if not folder.name.startswith(PREFIX) or folder.is_symlink() or not folder.is_dir():
        return None
    return folder if folder.stat().st_uid == os.getuid() else None


def _runs(pid: int, started: float) -> bool:
    try:
        return bool(abs(psutil.Process(pid).create_time() - started) < 1)
    except psutil.NoSuchProcess:
        return False
