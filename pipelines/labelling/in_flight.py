"""Requests in flight: the rows that are being asked about, written down before, so that it is known what a process died of.

A worker keeps one small file for the shard that it labels, holds the system's lock on it, and overwrites it before each
portion. The lock ends with the process: a file that nobody holds names the rows that were asked when its process died.
They are suspects: they are asked again in a process apart (`asking_apart`).
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_SUFFIX = ".in-flight"


@dataclass(frozen=True)
class Flight:
    """What one of the files says.

    Attributes:
      shard: key of the shard.
      start: first row in flight, counted within the shard.
      stop: row after the last.
      failed: rows of the shard without an answer so far.
      path: the file.
      alive: whether its process still runs.
    """

    shard: str
    start: int
    stop: int
    failed: int
    path: Path
    alive: bool

    @property
    def suspect(self) -> bool:
        """Whether its process died while rows were being asked about."""
        return not self.alive and self.stop > self.start


class InFlight:
    """This thread's file.

    Args:
      folder: where the files are; it is made.
      shard: key of the shard.
    """

    def __init__(self, folder: Path, shard: str) -> None:
        self._shard, self.path = shard, folder / f"{secrets.token_hex(8)}{_SUFFIX}"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def write(self, start: int, stop: int, failed: int) -> None:
        """Write down that rows are going to be asked; not flushed: a crash of the machine is no row's fault."""
        record = json.dumps([self._shard, start, stop, failed]).encode().ljust(96) + b"\n"
        os.pwrite(self._file, record, 0)

    def close(self) -> None:
        """Remove the file: its process has not died of these rows."""
        self.path.unlink(missing_ok=True)
        os.close(self._file)


def read_flights(folder: Path) -> list[Flight]:
    """Read the files of all processes, in the order of their names."""
    flights = []
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        with suppress(OSError, ValueError):
            shard, start, stop, failed = json.loads(path.read_text() or "null") or (None, 0, 0, 0)
            if shard is not None:
                flights.append(Flight(shard, start, stop, failed, path, _is_held(path)))
    return flights


def _is_held(path: Path) -> bool:
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: who looks is not taken for the owner
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(file)
