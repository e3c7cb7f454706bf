"""Results on disk: one JSON file per cell, so that a study that is stopped goes on where it was.

A cell's key holds everything that its result depends on: the dataset with its recipe, the teacher's settings, the method
with its options, the schedule, the seed, the sizes and training of the student, the recipe of the study, and the versions
of torch and numpy. The file's name is the key's hash; a key that changes is another cell.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.measuring.record import machine

PACKAGES = ("torch", "numpy", "scikit-learn", "scipy", "pyarrow")
Key = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A cell that can be computed.

    Attributes:
      key: what its result depends on, plain data.
      compute: gives its rows of figures.
    """

    key: Key
    compute: Callable[[], list[dict[str, Any]]]


@dataclass(frozen=True)
class Store:
    """The directory of the cells."""

    directory: Path

    def rows(self, cell: Cell) -> list[dict[str, Any]]:
        """Read a cell's rows; compute and write them first if need be."""
        path = self._path(cell.key)
        if not path.exists():
            start = time.process_time()
            rows = cell.compute()
            record = {"key": cell.key, "rows": rows, "seconds": time.process_time() - start, "machine": about_machine()}
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".part")
            temporary.write_text(json.dumps(record))
            temporary.rename(path)
        found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
        return found

    def has(self, cell: Cell) -> bool:
        """Whether a cell is there."""
        return self._path(cell.key).exists()

    def _path(self, key: Key) -> Path:
        versions = {name: about_machine()["packages"][name] for name in ("torch", "numpy")}
        text = json.dumps({**key, "versions": versions}, sort_keys=True)
        return self.directory / str(key["study"]) / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


@cache
def about_machine() -> dict[str, Any]:
    """Describe the machine, the versions and the command, as it is to be typed."""
    found = machine(PACKAGES)
    script, *arguments = found["command"].split(" ")[1:]
    module = script.removesuffix(".py").replace("/", ".")
    return {**found, "command": " ".join(["python -m", module, *arguments])}


def run(
    store: Store, cells: Sequence[Cell], minutes: float | None, say: Callable[[str], None] = print
) -> Iterable[tuple[Key, list[dict[str, Any]]]]:
    """Compute what is missing, in order, until the time is up; yield every cell that is there, by its key.

    Args:
      store: the cells' directory.
      cells: the study's, the most wanted first.
      minutes: of this call; None for as long as it takes.
      say: takes a line about the progress now and then.
    """
    start, told, computed = time.monotonic(), time.monotonic(), 0
    missing = sum(not store.has(cell) for cell in cells)
    say(f"{len(cells)} cells, {missing} to compute")
    left_out = 0
    for cell in cells:
        known = store.has(cell)
        if not known and minutes is not None and time.monotonic() - start > 60 * minutes:
            left_out += 1
            continue
        rows = store.rows(cell)
        computed += not known
        if time.monotonic() - told > 30:
            told = time.monotonic()
            say(f"{computed} of {missing} computed in {told - start:.0f} s")
        yield cell.key, rows
    if left_out:
        say(f"time is up: {left_out} cells are left for another run")
