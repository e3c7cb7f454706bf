"""Windows: the files that are labelled together, frozen in a journal before any work.

`windows/000003.json` is the journal of window 3 and `windows/000003.done.json` what became of it. A journal without the
second is carried out first when the job is started again: with the same files, and so to the same shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distilbeam.pipelines.jobs.watch_files import Arrival, PassedOver
from distilbeam.storage.files import read_json, write_json


@dataclass(frozen=True)
class Window:
    """A window.

    Attributes:
      number: its number, from 0.
      first_row: rows of all windows before it.
      files: its files.
      passed_over: files that were found with them and are not labelled.
      budget: labels to buy, or None for all.
    """

    number: int
    first_row: int
    files: tuple[Arrival, ...]
    passed_over: tuple[PassedOver, ...] = ()
    budget: int | None = None

    @property
    def rows(self) -> int:
        """Rows of its files."""
        return sum(file.rows for file in self.files)


class Journal:
    """The windows of a job, on disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.windows = [_window(read_json(path)) for path in sorted(directory.glob("[0-9]*[0-9].json"))]

    def __iter__(self) -> Iterator[Window]:
        return iter(self.windows)

    @property
    def rows(self) -> int:
        """Rows of all windows."""
        return self.windows[-1].first_row + self.windows[-1].rows if self.windows else 0

    def freeze(self, window: Window) -> None:
        """Write a new window's journal."""
        assert window.number == len(self.windows), "windows are numbered in their order"
        write_json(self._directory / f"{window.number:06d}.json", asdict(window))
        self.windows.append(window)

    def change(self, window: Window) -> None:
        """Write a window's journal again, of which nothing is labelled yet, when files were left out of it."""
        if window != self.windows[window.number]:
            write_json(self._directory / f"{window.number:06d}.json", asdict(window))
            self.windows[window.number] = window

    def unfinished(self) -> list[Window]:
        """List the windows that were frozen and not finished."""
        return [window for window in self.windows if not self._done(window).exists()]

    def finish(self, window: Window, summary: dict[str, Any]) -> None:
        """Record what became of a window."""
        write_json(self._done(window), summary)

    def summaries(self) -> Iterator[dict[str, Any]]:
        """Read what became of the finished windows."""
        for window in self.windows:
            if self._done(window).exists():
                yield read_json(self._done(window))

    def _done(self, window: Window) -> Path:
        return self._directory / f"{window.number:06d}.done.json"


def _window(data: dict[str, Any]) -> Window:
    files = tuple(Arrival(**file) for file in data["files"])
    passed_over = tuple(PassedOver(**file) for file in data["passed_over"])
    return Window(data["number"], data["first_row"], files, passed_over, data["budget"])
