"""A lease: one process at a time works in a folder of an object store, which has no locks.

Leases are numbered objects in the folder `.lease`. A process takes the next number by creating its object on the condition
that it is not there, which S3, Google Cloud Storage and Azure decide for exactly one of any number of processes; it holds
the folder while no higher number exists. Numbers only grow, so that nobody removes what another has just taken. The next
number may be taken when the last one was given back, when its process is gone (seen from the same machine), or when it was
not renewed for `EXPIRES_S` by the store's own clock; a killed job on another machine therefore blocks for that long.

What it does not promise: a process that stopped for longer than `EXPIRES_S` and wakes up works on until its next renewal,
at most `RENEW_S` later, finds the higher number. So do its workers on a cluster until their job is cancelled. Shards have
the same names and the same bytes then, so that the price is work done twice. On a store without conditional creation two
processes that start within the same moment may both go on.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from distilbeam.storage.files import read_json
from distilbeam.storage.paths import StoreError, asking_store, list_files, remove_files

FOLDER = ".lease"
RENEW_S = 20.0
EXPIRES_S = 120.0
_KEPT = 20  # former numbers that stay, for processes that looked long ago and still want to take the next

log = logging.getLogger("distilbeam.lease")


@dataclass(frozen=True)
class _Holder:
    """Who holds a folder.

    Attributes:
      token: chance, to know one's own object by.
      machine: the machine, as long as it runs.
      name: the machine's name.
      process: the process's id there.
      started: when it started, in seconds of the machine's clock.
      released: whether it has given the folder back.
    """

    token: str
    machine: str
    name: str
    process: int
    started: float
    released: bool = False

    def gone(self) -> bool:
        """Whether the process was on this machine and is no more."""
        if self.machine != _machine():
            return False
        try:
            return bool(abs(psutil.Process(self.process).create_time() - self.started) > 1)
        except psutil.NoSuchProcess:
            return True


class LeaseLostError(ValueError):
    """Another process has taken the folder over."""


@contextmanager
def leased(root: Path, setting: str, way_out: str) -> Iterator[None]:
    """Hold a folder of an object store against other processes until the block ends.

    Args:
      root: the folder.
      setting: what named it, for errors.
      way_out: the words with which another folder is chosen.

    Raises:
      ValueError: it cannot be written, or another process holds it.
      LeaseLostError: another process took it over because this one could not renew its lease.
    """
    holder = _Holder(secrets.token_hex(8), _machine(), os.uname().nodename, os.getpid(), psutil.Process().create_time())
    try:
        lease = _Lease.take(root, holder, setting)
    except (FileNotFoundError, StoreError) as e:
        raise ValueError(f"{setting}: {root} cannot be written ({e}); choose another with {way_out}") from e
    try:
        with lease:
            yield
    except KeyboardInterrupt as e:
        if lease.lost:
            raise LeaseLostError(lease.lost) from e
        raise
    if lease.lost:
        raise LeaseLostError(lease.lost)


class _Lease:
    def __init__(self, path: Path, holder: _Holder) -> None:
        self.path, self.holder, self.lost = path, holder, ""
        self._renewed = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    @classmethod
    def take(cls, root: Path, holder: _Holder, setting: str) -> _Lease:
        """Take the next number."""
        folder = root / FOLDER
        there = _numbered(folder)
        if there:
            _require_free(there[-1], root, setting)
        number = int(there[-1].stem) + 1 if there else 1
        path = folder / f"{number:08d}.json"
        try:
            _put(path, holder, mode="create")
        except FileExistsError:
            raise _busy(root, setting, _read(path)) from None
        there = _numbered(folder)
        if there[-1] != path or _read(path).token != holder.token:
            raise _busy(root, setting, _read(there[-1]))
        remove_files([old for old in there if int(old.stem) <= number - _KEPT])
        return cls(path, holder)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self.lost:
            with suppress(StoreError):  # then it expires
                _put(self.path, replace(self.holder, released=True))

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                last = _numbered(self.path.parent)[-1]
                if last != self.path:
                    self._lose(
                        f"{self.path.parents[1]} was taken over by {_described(_read(last))}; start again when it has ended"
                    )
                    return
                _put(self.path, self.holder)
                self._renewed = time.monotonic()
            except (StoreError, FileNotFoundError) as e:
                log.warning("the lease of %s could not be renewed: %s", self.path.parents[1], e)
            if time.monotonic() - self._renewed > 0.75 * EXPIRES_S:
                self._lose(
                    f"the lease of {self.path.parents[1]} could not be renewed for {0.75 * EXPIRES_S:.0f} s; start again"
                )
                return

    def _lose(self, sentence: str) -> None:
        self.lost = sentence
        log.error(sentence)
        if not self._stop.is_set():
            main = threading.main_thread().ident
            assert main is not None
            signal.pthread_kill(main, signal.SIGINT)  # wakes it up, whatever it waits for


def _require_free(path: Path, root: Path, setting: str) -> None:
    last = _read(path)
    if not (last.released or last.gone() or _age_s(path) > EXPIRES_S):
        raise _busy(root, setting, last)


def _busy(root: Path, setting: str, holder: _Holder) -> ValueError:
    return ValueError(
        f"{root} is being worked on by {_described(holder)}; wait for it to end or choose another {setting}. "
        f"If it was killed, its lease ends after {EXPIRES_S:.0f} s"
    )


def _described(holder: _Holder) -> str:
    return f"process {holder.process} on {holder.name}"


def _age_s(path: Path) -> float:
    """Return how long ago an object was written, by the store's clock."""
    store: Any = path
    probe = store.parent / f"{secrets.token_hex(8)}.probe"
    with asking_store(f"{path.parent} could not be asked for its time"):
        store.fs.pipe_file(probe.path, b"probe")
        try:
            now, then = store.fs.modified(probe.path), store.fs.modified(store.path)
        finally:
            store.fs.rm_file(probe.path)
    return float((now - then).total_seconds())


def _numbered(folder: Path) -> list[Path]:
    return sorted(list_files(folder, "*.json"))


def _read(path: Path) -> _Holder:
    return _Holder(**read_json(path))


def _put(path: Path, holder: _Holder, mode: str = "overwrite") -> None:
    store: Any = path
    with asking_store(f"{path} could not be written"):
        store.fs.pipe_file(store.path, json.dumps(asdict(holder)).encode(), mode=mode)


def _machine() -> str:
    """Name this machine, or this container, until it starts anew."""
    parts = [os.uname().nodename]
    try:
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").stat().st_ino),
        ]
    except OSError:  # not Linux
        parts.append(f"{uuid.getnode():x}")
    return " ".join(parts)
