"""The word to a streaming job, wherever its workers are, to read no further and to commit what it has."""

from __future__ import annotations

from distilbeam.pipelines.streaming.journal import FOLDER
from distilbeam.pipelines.transforms.beam_files import exists_anywhere
from distilbeam.storage.paths import is_remote, list_files, remove_files, to_path

_NAME = "stop"


def stop_wanted(dataset: str) -> bool:
    """Tell whether a dataset's job was told to stop."""
    return exists_anywhere(dataset, FOLDER, _NAME)


def ask_to_stop(dataset: str) -> None:
    """Tell a dataset's job to stop."""
    folder = to_path(dataset) / FOLDER
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    (folder / _NAME).touch()


def clear_stop(dataset: str) -> None:
    """Take the word back, before a job starts."""
    folder = to_path(dataset) / FOLDER
    remove_files(list(list_files(folder, _NAME)))
