"""Many manifests into one, many entries into one file, shards out of a dataset."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from distilbeam.teacher.softlabels.atomic import replacing
from distilbeam.teacher.softlabels.manifest import (
    FOLDER,
    Manifest,
    manifest_files,
    read_entries,
    read_manifest,
    require_same_meaning,
    write_entry,
)


def compact_manifest(path: str | Path) -> Path:
    """Gather all entries of a dataset in one file, which is faster to read than thousands.

    Entries that other processes write meanwhile stay as they are. A crash leaves entries twice, which means the same.
    The file `entry_path` of a gathered key no longer exists; `committed` still has the key.

    Args:
      path: the dataset's folder.

    Returns:
      The file with the entries.

    Raises:
      ValueError: no manifest, or one that cannot be read.
    """
    directory = Path(path)
    read_manifest(directory)
    files = {file: _identity(file) for file in manifest_files(directory)}
    entries = sorted(read_entries(list(files)), key=lambda entry: entry.path)
    text = "".join(json.dumps(entry.to_json(), sort_keys=True) + "\n" for entry in entries)
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    target = directory / FOLDER / f"gathered-{digest}.jsonl"
    with replacing(target) as temporary:
        temporary.write_text(text)
    for file, identity in files.items():
        if file != target and _identity(file) == identity:  # an entry that was written anew meanwhile stays
            file.unlink()
    return target


def merge_manifests(target: str | Path, sources: Sequence[str | Path]) -> Manifest:
    """Make one dataset of the shards of several without copying them.

    Args:
      target: folder of the new dataset; shards that it has already stay.
      sources: datasets that mean the same. The new manifest leads to their files by relative paths; the same key in two
        sources is one shard.

    Returns:
      The manifest of `target`.

    Raises:
      ValueError: the sources do not mean the same, or one has no manifest.
    """
    directory = Path(target)
    manifests = [read_manifest(source) for source in sources]
    for other in manifests[1:]:
        require_same_meaning(other.directory, manifests[0].entries[0], other.entries[0])
    entries = {entry.key: (entry, manifest.directory) for manifest in manifests for entry in manifest.entries}
    for entry, origin in entries.values():
        relative = os.path.relpath((origin / entry.path).resolve(), directory.resolve())
        write_entry(directory, replace(entry, path=Path(relative).as_posix()))
    return read_manifest(directory)


def remove_shards(path: str | Path, keys: Collection[str]) -> None:
    """Take shards out of a dataset: their entries first, then their files.

    A crash in between leaves files without an entry, which no reader follows. No other process may compact the manifest
    meanwhile.

    Args:
      path: the dataset's folder.
      keys: keys of the shards; unknown ones are passed over.

    Raises:
      ValueError: an entry that cannot be read.
    """
    directory = Path(path)
    removed: list[Path] = []
    for file in manifest_files(directory):
        entries = read_entries([file])
        kept = [entry for entry in entries if entry.key not in keys]
        removed += [directory / entry.path for entry in entries if entry.key in keys]
        if not kept:
            file.unlink()
        elif len(kept) < len(entries):
            with replacing(file) as temporary:
                temporary.write_text("".join(json.dumps(entry.to_json(), sort_keys=True) + "\n" for entry in kept))
    for shard in removed:
        shard.unlink(missing_ok=True)


def _identity(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_ino, stat.st_mtime_ns
