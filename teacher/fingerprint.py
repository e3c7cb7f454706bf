"""The files that a teacher is made of, hashed once and watched afterwards."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path

from distilbeam.teacher.protocol import TeacherChanged

_HEX_DIGITS = 16
Signature = tuple[tuple[str, int, int, int], ...]


class Artefact:
    """Files and folders whose content decides what a teacher answers.

    Args:
      paths: files, or folders with everything in them.
      settings: text that decides it too.

    Raises:
      ValueError: a path does not exist.
    """

    def __init__(self, paths: Iterable[str | Path], settings: str) -> None:
        self._paths = [Path(path) for path in paths]
        self._settings = settings
        self._lock = threading.Lock()
        for path in self._paths:
            if not path.exists():
                raise ValueError(
                    f"the teacher's file {path} does not exist; relative paths start at the configuration file"
                )
        self._signature = self._stat()
        self._digest = self._hash()

    def digest(self) -> str:
        """Return the hash of the content; files are read again only when size, time or identity changed.

        Raises:
          TeacherChanged: the content is no longer what it was when this object was made.
        """
        with self._lock:
            signature = self._stat()
            if signature != self._signature:
                found = self._hash()
                if found != self._digest:
                    names = ", ".join(str(path) for path in self._paths)
                    raise TeacherChanged(
                        f"the teacher changed while it was being asked: {names} had the hash {self._digest}, now {found}; "
                        "put the former files back, or start a new run directory"
                    )
                self._signature = signature
        return self._digest

    def _files(self) -> list[tuple[str, Path]]:
        """List all files by a name that does not depend on where the artefact lies."""
        found: list[tuple[str, Path]] = []
        for index, path in enumerate(self._paths):
            inside = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
            found += [(f"{index}/{p.relative_to(path).as_posix()}", p) for p in inside] or [(str(index), path)]
        return found

    def _stat(self) -> Signature:
        stats = ((name, path.stat()) for name, path in self._files())
        return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)

    def _hash(self) -> str:
        whole = hashlib.blake2b(self._settings.encode(), digest_size=_HEX_DIGITS // 2)
        for name, path in self._files():
            whole.update(f"\n{name}\n".encode())
            if path.is_file():
                with path.open("rb") as file:
                    whole.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
        return whole.hexdigest()
