"""Shards that are written but not flushed to the disk, which takes longer than writing and can wait.

A placed shard is a file under its final name and beside the manifest's entries a file `<key>.placed`, which becomes the
entry by being renamed when both are on the disk. Readers do not see it before. When the process is killed, the next one
finds the shard and commits it; after a crash of the machine the checksum tells whether it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from distilbeam.storage.atomic import flush, move_flushed, replacing
from distilbeam.storage.paths import list_files, to_path
from distilbeam.storage.stores import store_of
from distilbeam.teacher.softlabels.manifest import FOLDER, ManifestEntry, entry_path, is_inside
from distilbeam.teacher.softlabels.shards import has_checksum, write_file, write_shard
from distilbeam.teacher.softlabels.spec import SoftLabelSpec

_SUFFIX = ".placed"


def place_shard(
    directory: str | Path, rows: pa.Table, spec: SoftLabelSpec, key: str, extra: Mapping[str, Any] | None = None
) -> ManifestEntry:
    """Write a shard and leave its commit to `commit_placed`; in an object store, which flushes nothing, commit it.

    Args:
      directory: the soft-label dataset that the shard becomes part of.
      rows: the rows, as for `write_shard`.
      spec: the dataset's specification, which the entry repeats.
      key: key under which the shard will be committed, and the name of its file.
      extra: further facts for the manifest entry, as JSON values.

    Returns:
      The manifest entry.

    Raises:
      ValueError: see `write_shard`.
    """
    if not _takes_placed(directory):
        return write_shard(directory, key, rows, spec, key, extra)
    entry = write_file(directory, key, rows, spec, key, extra, flushed=False)
    with replacing(_placed_path(directory, key), flushed=False) as temporary:
        temporary.write_text(entry.to_text())
    return entry


def placed_entry(directory: str | Path, key: str) -> ManifestEntry | None:
    """Return the entry of a placed shard that is whole; None where there is none, as in an object store."""
    if not _takes_placed(directory):
        return None
    try:
        entry = ManifestEntry.from_json(json.loads(_placed_path(directory, key).read_text()))
        whole = is_inside(to_path(directory), entry.path) and entry.key == key
        return entry if whole and has_checksum(to_path(directory) / entry.path, entry.checksum) else None
    except (FileNotFoundError, ValueError):
        return None


def commit_placed(directory: str | Path, entries: Sequence[ManifestEntry]) -> None:
    """Flush placed shards to the disk and commit them; those that another process has committed are passed over.

    Raises:
      OSError: the disk did not take them; they are no longer placed.
    """
    if not _takes_placed(directory) or not entries:
        return
    moves = {_placed_path(directory, entry.key): entry_path(directory, entry.key) for entry in entries}
    try:
        for entry in entries:
            flush(to_path(directory) / entry.path)
        flush(to_path(directory))
        while moves := {placed: path for placed, path in moves.items() if placed.exists()}:
            with suppress(FileNotFoundError):  # another process has just committed one of them
                move_flushed(moves)
    except OSError:  # what could not be flushed may be read from memory as if it had been
        for placed in moves:
            placed.unlink(missing_ok=True)
        raise


def placed_entries(directory: Path) -> list[ManifestEntry]:
    """List the entries of a dataset's placed shards that are whole."""
    if not _takes_placed(directory):
        return []
    keys = sorted(path.stem for path in list_files(directory / FOLDER, f"*{_SUFFIX}"))
    return [entry for key in keys if (entry := placed_entry(directory, key)) is not None]


def commit_all_left(root: Path) -> int:
    """Commit what a killed process has placed in the datasets in a folder and forget what is not whole.

    Args:
      root: a folder of the file system in which no other process places shards.

    Returns:
      How many were whole.
    """
    count = 0
    for directory in {path.parent.parent for path in root.rglob(f"{FOLDER}/*{_SUFFIX}")}:
        whole = placed_entries(directory)
        commit_placed(directory, whole)
        for path in (directory / FOLDER).glob(f"*{_SUFFIX}"):
            path.unlink()
        count += len(whole)
    return count


def _placed_path(directory: str | Path, key: str) -> Path:
    return entry_path(directory, key).with_suffix(_SUFFIX)


def _takes_placed(directory: str | Path) -> bool:
    """Tell whether shards are placed first and committed together: an object that appears is on disks already."""
    return not store_of(directory).by_request
