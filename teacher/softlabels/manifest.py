"""The manifest: which shards a dataset has.

A dataset is a folder of Parquet files and a folder `_manifest` of JSON files. A shard belongs to the dataset when an
entry names it; a Parquet file without an entry is what a crash left behind. Entries are written one by one, by any
number of processes, or many to a file (`gathering.compact_manifest`); the same key twice is one shard.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from distilbeam.storage.atomic import replacing
from distilbeam.storage.paths import is_remote, joined, list_files, read_texts, to_path
from distilbeam.teacher.softlabels.spec import SoftLabelSpec

FOLDER = "_manifest"
_READ_ATTEMPTS = 10
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*")
_REQUIRED = {"key": str, "path": str, "rows": int, "bytes": int, "checksum": str, "spec": dict}


@dataclass(frozen=True)
class ManifestEntry:
    """One committed shard.

    Attributes:
      key: the key under which it was committed.
      path: its file, relative to the dataset.
      rows: its rows.
      bytes: size of its file.
      checksum: hash of its file.
      spec: its specification.
      extra: further facts, as JSON values.
      footer: hash of its footer; empty in entries of former versions.
    """

    key: str
    path: str
    rows: int
    bytes: int
    checksum: str
    spec: SoftLabelSpec
    extra: Mapping[str, Any] = field(default_factory=dict)
    footer: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the entry as JSON values."""
        return {**vars(self), "spec": json.loads(self.spec.to_json()), "extra": dict(self.extra)}

    def to_text(self) -> str:
        """Return the entry as a line of JSON, without its end."""
        return json.dumps(self.to_json(), sort_keys=True)

    @classmethod
    def from_json(cls, data: Any) -> ManifestEntry:
        """Read an entry; fields that a newer minor version added are ignored.

        Raises:
          ValueError: a field is missing or of another type.
        """
        if not isinstance(data, dict):
            raise ValueError(f"an entry must be a JSON object, got {type(data).__name__}")
        for name, type_ in _REQUIRED.items():
            if not isinstance(data.get(name), type_):
                raise ValueError(f"{name} must be given as {type_.__name__}, got {data.get(name)!r}")
        if not _KEY.fullmatch(data["key"]):
            raise ValueError(f"key must be letters, digits, '.', '_', '=' and '-', got {data['key']!r}")
        if not isinstance(data.get("extra", {}), dict):
            raise ValueError(f"extra must be given as dict, got {data['extra']!r}")
        _require_relative(data["path"])
        spec = SoftLabelSpec.from_json(data["spec"])
        required = {name: data[name] for name in _REQUIRED if name != "spec"}
        return cls(**required, spec=spec, extra=data.get("extra", {}), footer=str(data.get("footer", "")))


@dataclass(frozen=True)
class Manifest:
    """The committed shards of a dataset, in the order of their paths.

    Attributes:
      directory: the folder of the soft-label dataset.
      entries: its shards.
      spec: what all of them mean; the newest format version among them.
    """

    directory: Path
    entries: tuple[ManifestEntry, ...]
    spec: SoftLabelSpec

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(entry.rows for entry in self.entries)

    @property
    def bytes(self) -> int:
        """Bytes of all shards' files."""
        return sum(entry.bytes for entry in self.entries)

    def paths(self) -> list[Path]:
        """List the shards' files."""
        return [joined(self.directory, entry.path) for entry in self.entries]


def entry_path(directory: str | Path, key: str) -> Path:
    """Return the file of the manifest entry that `write_shard` writes for a key."""
    return to_path(directory) / FOLDER / f"{key}.json"


def write_entry(directory: str | Path, entry: ManifestEntry) -> None:
    """Commit a shard whose file is in place."""
    with replacing(entry_path(directory, entry.key)) as temporary:
        temporary.write_text(entry.to_text())


def read_manifest(path: str | Path) -> Manifest:
    """Read the manifest of a dataset.

    Args:
      path: the folder of the soft-label dataset, on a disk or in an object store.

    Returns:
      The manifest. Files are not opened; `verify` compares them with it.

    Raises:
      ValueError: no manifest, an entry that cannot be read, shards that do not mean the same, one file under two keys,
        a file outside of the dataset that no manifest there lists, a link, or an unknown major format version.
    """
    directory = to_path(path)
    return manifest_of(directory, _entries(directory))


def manifest_of(directory: Path, found: Sequence[ManifestEntry]) -> Manifest:
    """Make the manifest of a dataset of its entries; see `read_manifest`."""
    entries = sorted(found, key=lambda entry: (entry.path, entry.key))
    if not entries:
        raise ValueError(
            f"{directory} has no soft labels: there is no entry in {directory / FOLDER}; label something first"
        )
    first = entries[0]
    for entry in entries[1:]:
        require_same_meaning(directory, first, entry)
    for one, two in itertools.pairwise(entries):
        if one.path == two.path:
            raise ValueError(
                f"{directory / one.path} is committed under two keys, {one.key} and {two.key}; write it again"
            )
    _require_own(directory, entries)
    return Manifest(directory, tuple(entries), max((e.spec for e in entries), key=_minor))


def committed(path: str | Path) -> set[str]:
    """List the keys of a dataset's committed shards.

    Args:
      path: the dataset's folder; one that does not exist has none.

    Raises:
      ValueError: an entry that cannot be read.
    """
    return {entry.key for entry in _entries(to_path(path))}


def read_entries(files: Sequence[Path]) -> list[ManifestEntry]:
    """Read the entries of manifest files; of equal keys the last one counts.

    Raises:
      ValueError: an entry that cannot be read.
      FileNotFoundError: another process has removed a file.
    """
    found: dict[str, ManifestEntry] = {}
    for file, text in zip(files, read_texts(files), strict=True):
        for line in text.splitlines() if file.suffix == ".jsonl" else [text]:
            try:
                entry = ManifestEntry.from_json(json.loads(line))
            except ValueError as e:
                raise ValueError(f"manifest entry {file} cannot be read: {e}") from e
            found[entry.key] = entry
    return list(found.values())


def manifest_files(directory: Path) -> list[Path]:
    """List the files of a manifest: those with many entries first, so that an entry written later counts."""
    files = (file for file in list_files(directory / FOLDER, "*.json*") if not file.name.startswith("."))
    return sorted(files, key=lambda file: (file.suffix != ".jsonl", file.name))


def require_same_meaning(directory: Path, one: ManifestEntry, two: ManifestEntry) -> None:
    """Refuse two shards that may not be read together.

    Raises:
      ValueError: they differ in classes, kind, temperature or teacher.
    """
    if differences := one.spec.differences(two.spec):
        raise ValueError(
            f"the shards of {directory} do not mean the same: {one.path} and {two.path} differ in "
            f"{', '.join(differences)}; "
            "keep labels of different teachers or specifications in different folders"
        )


def is_inside(directory: Path, path: str) -> bool:
    """Tell whether an entry's path leads to a file of the dataset's own folder, through no link."""
    parts = PurePosixPath(path).parts
    if ".." in parts:
        return False
    if is_remote(directory):
        return True
    places = itertools.accumulate(parts, lambda place, part: place / part, initial=directory)
    return not any(place.is_symlink() for place in itertools.islice(places, 1, None))


def _require_relative(path: str) -> None:
    """Refuse what is no relative path wherever it is read: a manifest may come from anybody."""
    absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).anchor or "://" in path
    if absolute or not PurePosixPath(path).name or "\0" in path:
        raise ValueError(f"path must be relative to the dataset, got {path!r}")


def _require_own(directory: Path, entries: Sequence[ManifestEntry]) -> None:
    """Refuse files that are not the dataset's; those of a merged one are listed by the manifest that they come from."""
    origins: dict[Path, dict[str, tuple[str, str]]] = {}
    for entry in entries:
        if is_inside(directory, entry.path):
            continue
        file = joined(directory, entry.path)
        origin = file.parent.resolve()
        if ".." in PurePosixPath(entry.path).parts and origin != directory.resolve():
            if origin not in origins:
                origins[origin] = {e.path: (e.key, e.checksum) for e in _entries(origin) if is_inside(origin, e.path)}
            if origins[origin].get(file.name) == (entry.key, entry.checksum):
                continue
        raise ValueError(
            f"the manifest entry of {entry.key} in {directory} leads to {entry.path!r}, which is not a file of the dataset "
            "itself, nor of one that it was merged from; nothing of it is read: get the dataset again from where it came"
        )


def _entries(directory: Path) -> list[ManifestEntry]:
    for _ in range(_READ_ATTEMPTS):
        try:
            return read_entries(manifest_files(directory))
        except FileNotFoundError:  # the manifest was compacted between listing and reading
            continue
    raise ValueError(f"the manifest of {directory} changes faster than it can be read; try again")


def _minor(spec: SoftLabelSpec) -> int:
    return int(spec.version.partition(".")[2])
