"""Work for the tests of phases; as a program, a phase with two worker processes of which one is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Squares:
    """Commits the square of a number; fails for those in `broken`, and once for those in `shaky`."""

    directory: str
    broken: tuple[int, ...] = ()
    shaky: tuple[int, ...] = ()

    def __call__(self, item: int) -> None:
        attempts = Path(self.directory) / f"attempts-{item}"
        count = int(attempts.read_text()) + 1 if attempts.exists() else 1
        attempts.write_text(str(count))
        if item in self.broken:
            raise ValueError(f"{item} is broken")
        if item in self.shaky and count == 1:
            raise ConnectionError("the line was cut")
        self._file(item).write_text(str(item * item))

    def done(self, item: int) -> bool:
        return self._file(item).exists()

    def name(self, item: int) -> str:
        return f"number {item}"

    def remaining(self, items: Sequence[int]) -> list[int]:
        return [item for item in items if not self.done(item)]

    def rows(self, _: int) -> int:
        return 1

    def settle(self, _: Sequence[object]) -> None:
        """Nothing is left to settle."""

    def _file(self, item: int) -> Path:
        return Path(self.directory) / f"{item}.txt"

    def attempts(self, item: int) -> int:
        file = Path(self.directory) / f"attempts-{item}"
        return int(file.read_text()) if file.exists() else 0


@dataclass(frozen=True)
class Deadly(Squares):
    """Kills its own process at the first attempt at the items in `deadly`, or at every one."""

    deadly: tuple[int, ...] = ()
    always: bool = False

    def __call__(self, item: int) -> None:
        if item in self.deadly and (self.always or self.attempts(item) == 0):
            (Path(self.directory) / f"attempts-{item}").write_text("1")
            os.kill(os.getpid(), signal.SIGKILL)
        super().__call__(item)


def main() -> None:
    from square_work import Deadly as ImportedDeadly  # workers must find the class by its module's name

    from distilbeam.pipelines.engine.beam_options import pipeline_options
    from distilbeam.pipelines.engine.ending import end_given_up
    from distilbeam.pipelines.engine.phase import PhaseError, run_phase

    directory, always = sys.argv[1], sys.argv[2] == "1"
    work = ImportedDeadly(directory, deadly=(2,), always=always)
    options = pipeline_options(["--direct_running_mode=multi_processing", "--direct_num_workers=2"])
    try:
        print(run_phase("square", work, list(range(6)), errors=Path(directory) / "errors", options=options).items)
    except PhaseError as e:
        print(e)
    end_given_up(0)


if __name__ == "__main__":
    main()
