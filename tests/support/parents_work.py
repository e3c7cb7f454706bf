"""As a program: two phases with two worker processes; each item writes who worked on it and whose child that was."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Parents:
    """Writes the worker's and its parent's process ids, and takes a while."""

    directory: str
    seconds: float

    def __call__(self, item: int) -> None:
        time.sleep(self.seconds)
        self._file(item).write_text(f"{os.getpid()} {os.getppid()}")

    def remaining(self, items: Sequence[int]) -> list[int]:
        return [item for item in items if not self._file(item).exists()]

    def name(self, item: int) -> str:
        return f"number {item}"

    def rows(self, _: int) -> int:
        return 1

    def settle(self, _: Sequence[object]) -> None:
        """Nothing is left to settle."""

    def _file(self, item: int) -> Path:
        return Path(self.directory) / f"{item}.txt"


def main() -> None:
    from parents_work import Parents as ImportedParents  # workers must find the class by its module's name

    from distilbeam.pipelines.engine.beam_options import pipeline_options
    from distilbeam.pipelines.engine.phase import run_phase

    directory, seconds = sys.argv[1], float(sys.argv[2])
    options = pipeline_options(["--direct_running_mode=multi_processing", "--direct_num_workers=2"])
    for items in ([0, 1, 2, 3], [4, 5]):
        run_phase(
            "write", ImportedParents(directory, seconds), items, errors=Path(directory) / "errors", options=options
        )


if __name__ == "__main__":
    main()
