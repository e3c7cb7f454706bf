"""Arrivals in a watched directory: the files that are new and whole.

A file is taken when its size and time have not changed for `settle_s` seconds and its Parquet footer can be read: a file
that is still being written has none. Its columns are read once, so that one that is damaged is passed over and keeps no other
from its labels. A file whose content was taken before, under whatever name, is a duplicate; a file
that was taken and then changed is new.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.teacher.softlabels import file_checksum


@dataclass(frozen=True)
class Arrival:
    """A file as it was found: name relative to the directory, size in bytes, time of change in ns, hash of its content, rows."""

    name: str
    bytes: int
    mtime_ns: int
    checksum: str
    rows: int


@dataclass(frozen=True)
class PassedOver:
    """A whole file that is not labelled, and why."""

    name: str
    bytes: int
    mtime_ns: int
    why: str


class Arrivals:
    """Looks for new files.

    Args:
      directory: the directory, with its folders; names that begin with a dot or an underscore are passed over.
      settle_s: seconds that a file must stay as it is.
      fits: says what is wrong with a file's schema, or nothing.
      columns: the columns that will be read.
      clock: seconds that only grow.
    """

    def __init__(
        self,
        directory: Path,
        settle_s: float,
        fits: Callable[[pa.Schema], str],
        clock: Callable[[], float] = time.monotonic,
        columns: Sequence[str] = (),
    ) -> None:
        self._columns = columns
        self._directory, self._settle_s, self._fits, self._clock = directory, settle_s, fits, clock
        self._seen: dict[str, tuple[int, int]] = {}
        self._contents: dict[str, str] = {}
        self._waiting: dict[str, tuple[tuple[int, int], float]] = {}
        self._unsettled: set[str] = set()
        self.unreadable: set[str] = set()

    @property
    def unsettled(self) -> bool:
        """Whether the last look found files that may still change."""
        return bool(self._unsettled)

    def remember(self, files: Iterable[Arrival | PassedOver]) -> None:
        """Take files as known."""
        for file in files:
            self._seen[file.name] = (file.bytes, file.mtime_ns)
            if isinstance(file, Arrival):
                self._contents.setdefault(file.checksum, file.name)

    def look(self) -> tuple[list[Arrival], list[PassedOver]]:
        """Return the files that became whole since the last look, in the order of their names, and those passed over."""
        self._unsettled, self.unreadable = set(), set()
        taken: list[Arrival] = []
        passed: list[PassedOver] = []
        for path in sorted(self._directory.rglob("*.parquet")):
            name = str(path.relative_to(self._directory))
            if not any(part.startswith((".", "_")) for part in Path(name).parts):
                found = self._examine(path, name)
                if found is not None:
                    self.remember([found])
                    (taken if isinstance(found, Arrival) else passed).append(found)  # type: ignore[arg-type]
        return taken, passed

    def _examine(self, path: Path, name: str) -> Arrival | PassedOver | None:
        try:
            state = path.stat()
            now = (state.st_size, state.st_mtime_ns)
            if self._seen.get(name) == now or not self._settled(name, now):
                return None
            name.encode()
            metadata = pq.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
            checksum = file_checksum(path, "blake2b")  # as journals that are there have it
        except FileNotFoundError:  # taken away between two looks
            return None
        except UnicodeEncodeError:  # the journal could not name it
            self.unreadable.add(name.encode(errors="backslashreplace").decode())
            return None
        except (pa.ArrowException, OSError):
            self.unreadable.add(name)
            return None
        if metadata.num_rows == 0:
            return PassedOver(name, *now, "it has no rows")
        if problem := self._fits(schema):
            return PassedOver(name, *now, problem)
        if checksum in self._contents:
            return PassedOver(name, *now, f"its content came before, as {self._contents[checksum]}")
        if problem := self._damage(path):
            return PassedOver(name, *now, problem)
        return Arrival(name, *now, checksum, metadata.num_rows)

    def _damage(self, path: Path) -> str:
        """Say what keeps a file's columns from being read, or nothing."""
        if not self._columns:
            return ""
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for _ in file.iter_batches(columns=list(self._columns)):
                    pass
        except (pa.ArrowException, OSError) as e:
            return f"it is damaged ({str(e).strip().splitlines()[0]})"
        return ""

    def _settled(self, name: str, now: tuple[int, int]) -> bool:
        before, since = self._waiting.get(name, (None, 0.0))
        if before != now:
            self._waiting[name] = now, self._clock()
            since = self._waiting[name][1]
        if self._clock() - since < self._settle_s:
            self._unsettled.add(name)
            return False
        return True
