"""The contents of a labelling job's pool, in `contents.json`: by them a file whose values changed is found.

A file's footer stays the same when a vector is corrected or an image is replaced by one of equal size. A file whose size, time
of change and inode (in an object store: version) are those of the last call holds what it held. The rows of any other are
compared with those that are stored beside their labels. A content that differs under the same footer is counted as another
version, which gives its units other ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distilbeam.pipelines.pool.splits import Pool, Unit
from distilbeam.storage.files import read_json, write_json

_STATE = 3  # entries of a state that count: the machine does not


@dataclass(frozen=True)
class FileRecord:
    """What is known of a file.

    Attributes:
      footer: digest of its footer.
      state: what tells it from a file that replaces it; see `Store.identity`.
      version: number of contents with this footer that were seen before.
      uids: ids of its units.
    """

    footer: str
    state: tuple[Any, ...]
    version: int = 0
    uids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contents:
    """The files of a job's pool, by name, also those that are gone.

    Attributes:
      files: what is known of each.
      same: rows of units that are the same as others, id and question, and are kept once: ranges by unit.
    """

    files: Mapping[str, FileRecord] = field(default_factory=dict)
    same: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def versioned(self, pool: Pool) -> Pool:
        """Give the units of files with a later content the ids that they have."""
        digests, names = dict(pool.files), {path: name for name, path in pool.paths}

        def with_version(unit: Unit) -> Unit:
            known = self.files.get(names[unit.path])
            if known is None or not known.version or known.footer != digests[names[unit.path]]:
                return unit
            text = f"{unit.uid}|{known.version}"
            return replace(unit, uid=hashlib.blake2b(text.encode(), digest_size=8).hexdigest())

        return replace(pool, units=tuple(with_version(unit) for unit in pool.units))

    def touched(self, pool: Pool, check_all: bool) -> list[str]:
        """List the files whose footer is the known one and whose content may be another."""
        states = dict(pool.states)
        return [
            name
            for name, digest in pool.files
            if (known := self.files.get(name)) is not None
            and known.footer == digest
            and (check_all or tuple(known.state) != tuple(states[name][:_STATE]))
        ]

    def replaced(self, pool: Pool) -> set[str]:
        """List the ids of former units whose file is there with another content."""
        names, now = dict(pool.files), {unit.uid for unit in pool.units}
        return {uid for name, known in self.files.items() if name in names for uid in known.uids} - now

    def with_changed(self, names: Sequence[str]) -> Contents:
        """Count another content of some files."""
        changed = {name: replace(self.files[name], version=self.files[name].version + 1) for name in names}
        return Contents({**self.files, **changed}, {} if names else self.same)

    def of(self, pool: Pool, same: Mapping[str, tuple[int, ...]]) -> Contents:
        """Record a pool as it is now, planned with these versions; files that are gone stay known."""
        states, names = dict(pool.states), {path: name for name, path in pool.paths}
        uids: dict[str, list[str]] = {name: [] for name, _ in pool.files}
        for unit in pool.units:
            uids[names[unit.path]].append(unit.uid)
        now = {}
        for name, digest in pool.files:
            known = self.files.get(name)
            version = known.version if known is not None and known.footer == digest else 0
            now[name] = FileRecord(digest, tuple(states[name][:_STATE]), version, tuple(uids[name]))
        return Contents({**self.files, **now}, same)

    def write(self, path: Path) -> None:
        """Write the record."""
        files = {
            name: {"footer": f.footer, "state": list(f.state), "version": f.version, "uids": list(f.uids)}
            for name, f in self.files.items()
        }
        write_json(path, {"files": files, "same": {uid: list(ranges) for uid, ranges in self.same.items()}})


def read_contents(path: Path) -> Contents:
    """Read a record; where there is none, nothing is known."""
    if not path.exists():
        return Contents()
    data = read_json(path)
    files = {
        name: FileRecord(f["footer"], tuple(f["state"]), f["version"], tuple(f["uids"]))
        for name, f in data["files"].items()
    }
    return Contents(files, {uid: tuple(ranges) for uid, ranges in data["same"].items()})
