"""Many manifests into one, many entries into one file, shards out of a dataset."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from distilbeam.storage.atomic import replacing
from distilbeam.storage.paths import identities, remove_files, to_path
from distilbeam.storage.stores import store_of
from distilbeam.teacher.softlabels.manifest import (
    FOLDER,
    Manifest,
    is_inside,
    manifest_files,
    manifest_of,
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
      path: the folder of the soft-label dataset, on a disk or in an object store.

    Returns:
      The file with the entries.

    Raises:
      ValueError: no manifest, or one that cannot be read.
    """
    directory = to_path(path)
    files = identities(manifest_files(directory))
    entries = manifest_of(directory, read_entries(list(files))).entries
    text = "".join(entry.to_text() + "\n" for entry in entries)
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    target = directory / FOLDER / f"gathered-{digest}.jsonl"
    with replacing(target) as temporary:
        temporary.write_text(text)
    gathered = [file for file in files if file != target]
    now = identities(gathered)
    remove_files([file for file in gathered if now.get(file) == files[file]])  # one that was written anew stays
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
      ValueError: the sources do not mean the same, one has no manifest, or they are not where the target is: in the same
        bucket, or all on the file system.
    """
    directory = to_path(target)
    manifests = [read_manifest(source) for source in sources]
    for other in manifests[1:]:
        require_same_meaning(other.directory, manifests[0].entries[0], other.entries[0])
    entries = {entry.key: (entry, manifest.directory) for manifest in manifests for entry in manifest.entries}
    for entry, origin in entries.values():
        write_entry(directory, replace(entry, path=_relative(origin / entry.path, directory)))
    return read_manifest(directory)


def remove_shards(path: str | Path, keys: Collection[str]) -> None:
    """Take shards out of a dataset: their entries first, then their files.

    A crash in between leaves files without an entry, which no reader follows. No other process may compact the manifest
    meanwhile. Files outside of the dataset stay, wherever its entries lead.

    Args:
      path: the folder of the soft-label dataset, on a disk or in an object store.
      keys: keys of the shards; unknown ones are passed over.

    Raises:
      ValueError: an entry that cannot be read.
    """
    directory = to_path(path)
    removed: list[Path] = []
    for file in manifest_files(directory) if keys else ():
        if file.suffix == ".json" and file.stem not in keys:  # `write_entry` names the file by the key
            continue
        entries = read_entries([file])
        kept = [entry for entry in entries if entry.key not in keys]
        removed += [
            directory / entry.path for entry in entries if entry.key in keys and is_inside(directory, entry.path)
        ]
        if not kept:
            file.unlink()
        elif len(kept) < len(entries):
            with replacing(file) as temporary:
                temporary.write_text("".join(entry.to_text() + "\n" for entry in kept))
    remove_files(removed)


def _relative(file: Path, directory: Path) -> str:
    """Return the path of a shard's file as an entry of the dataset in `directory` names it."""
    if store_of(file) is store_of(directory) and file.anchor == directory.anchor:
        return Path(os.path.relpath(str(file.resolve()), str(directory.resolve()))).as_posix()
    raise ValueError(
        f"datasets must be in one bucket, or all on the file system, to be merged without copying them: {file.parent} and "
        f"{directory}; copy one beside the other"
    )
