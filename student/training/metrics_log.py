"""The metrics log of a training: lines of metrics.jsonl, experiment trackers, and what its progress is told.

metrics.jsonl has a line for every epoch (`epoch`, `step`, `train_loss`, `validation_...`) and, if asked for, one every n
steps (`step`, `loss`, `gradient_norm`); all with `lr`, `examples_per_s` since the last line of the kind, and `seconds` in all.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from distilbeam.progress import Progress
from distilbeam.storage.atomic import replacing
from distilbeam.student.training.checkpoints import METRICS
from distilbeam.student.training.config import LoopConfig
from distilbeam.student.training.trackers import Tracker, open_tracker, trackers_of


class Observer:
    """Writes and shows figures; a context that closes what it opened.

    Args:
      directory: where the files are.
      training: the training's configuration.
      total: steps in all.
      done: steps done before, whose lines stay; later ones, of a process that was killed, go.
      seconds: time spent before.
      progress: told every step, with its loss, and every epoch.
      silent: write nothing: another process does.

    Raises:
      ValueError: a tracker is asked for and not installed.
    """

    def __init__(
        self,
        directory: Path,
        training: LoopConfig,
        total: int,
        done: int,
        seconds: float,
        progress: Progress,
        silent: bool,
    ) -> None:
        self._training, self._total, self._progress = training, total, progress
        self._began = time.perf_counter() - seconds
        now = time.perf_counter()
        self._since = {"step": (now, 0), "epoch": (now, 0)}  # time and examples at the last line of each kind
        self._examples, self._lr = 0, 0.0
        self._lines: TextIO | None = None
        self._trackers: list[Tracker] = []
        if not silent:
            settings = training.model_dump(mode="json", exclude_none=True)
            self._trackers = [open_tracker(name, directory, done, settings) for name in trackers_of(training)]
            self._lines = _opened(directory / METRICS, done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._lines is not None:
            self._lines.close()
        for tracker in self._trackers:
            tracker.close()

    @property
    def seconds(self) -> float:
        """Time that the training took so far, in every process that worked on it."""
        return time.perf_counter() - self._began

    def step(self, done: int, loss: float, lr: float, norm: float | None, examples: int) -> None:
        """Take note of a step."""
        self._examples, self._lr = self._examples + examples, lr
        if self._training.log_steps is not None and done % self._training.log_steps == 0:
            self._write("step", {"step": done, "loss": loss} | ({} if norm is None else {"gradient_norm": norm}))
        self._progress.step(done, self._total, f"loss {loss:.4f}")

    def epoch(self, done: int, figures: Mapping[str, float]) -> None:
        """Take note of an epoch."""
        self._write("epoch", {"epoch": figures["epoch"], "step": done} | dict(figures))
        self._progress.epoch(int(figures["epoch"]), figures)

    def _write(self, kind: str, figures: dict[str, float]) -> None:
        if self._lines is None:
            return
        now, (then, examples) = time.perf_counter(), self._since[kind]
        rate = (self._examples - examples) / max(now - then, 1e-9)
        figures |= {"lr": self._lr, "examples_per_s": round(rate, 1), "seconds": round(self.seconds, 3)}
        self._since[kind] = now, self._examples
        self._lines.write(json.dumps(figures) + "\n")
        for tracker in self._trackers:
            tracker.log(figures, int(figures["step"]))


def read_epochs(student: Path) -> list[dict[str, float]]:
    """Read the figures of every epoch of a student's training, in their order."""
    lines = [json.loads(line) for line in (student / METRICS).read_text().splitlines()]
    return [line for line in lines if "epoch" in line]


def _opened(path: Path, done: int) -> TextIO:
    """Open the lines for more of them, without those of steps that will be done again."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # the last line of a killed process may be half a line
            if json.loads(line)["step"] <= done:
                kept.append(line + "\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept))
    return path.open("a", buffering=1)
