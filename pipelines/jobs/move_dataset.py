"""Moving a dataset to another folder: a rename on a file system, copies and removals with a journal in an object store.

The journal is written before the first copy and removed after the last removal, so that a move that was killed is finished
when the job is opened again. Nothing is lost in between: what is removed was copied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distilbeam.storage.files import read_json, write_json
from distilbeam.storage.paths import asking_store, is_remote, remove_files, to_path

_JOURNAL = "moving.json"


def move_folder(source: Path, target: Path, root: Path) -> None:
    """Move a folder to a name that is free.

    Args:
      source: the folder.
      target: its new name.
      root: the job's directory, which this process holds.
    """
    if not is_remote(root):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        return
    write_json(root / _JOURNAL, {"source": str(source), "target": str(target)})
    finish_move(root)


def finish_move(root: Path) -> None:
    """Finish the move that a killed process has begun, if there is one; `root` is held by this process."""
    if not is_remote(root) or not (root / _JOURNAL).exists():
        return
    journal = read_json(root / _JOURNAL)
    source: Any = to_path(journal["source"])
    target: Any = to_path(journal["target"])
    with asking_store(f"{source} could not be moved to {target}"):
        names = source.fs.find(source.path)
        copies = [target.path + name.removeprefix(source.path) for name in names]
        if names:
            source.fs.copy(names, copies)
    remove_files([type(source)(f"{source.protocol}://{name}", **source.storage_options) for name in names])
    remove_files([root / _JOURNAL])
