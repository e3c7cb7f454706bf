"""A step of a run: what it commits, and how it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from distilbeam.progress import Progress


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
      name: what it belongs to: "encode", "train", "ask", "select", "label", "compare", "evaluate" or "report".
      round: number of the round, or None.
      title: what is shown.
      commit: the file or directory whose presence means that the step is done.
      do: does it, reporting progress.
      current: tells of what is committed whether it is of the settings that the configuration has now.
    """

    name: str
    round: int | None
    title: str
    commit: Path
    do: Callable[[Progress], None]
    current: Callable[[], bool] = lambda: True

    @property
    def done(self) -> bool:
        """Whether nothing is left of it."""
        return self.commit.exists() and self.current()
