"""The directory of a training under way, `NAME.training` beside the student `NAME` that it will become.

    step-000001200.safetensors   all that the training is after so many steps; the last few of them
    metrics.jsonl                its figures so far
    tensorboard/, mlflow/, ...   the same for a tracker
    stopped-at.safetensors       the batch whose loss was not a number
    launcher.json                the folder of the torchrun that started it

A checkpoint is one file that appears by one rename: its tensors, and everything else as JSON in its header. It is gone
when the student is there.
"""

from __future__ import annotations

import fcntl
import glob
import json
import logging
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distilbeam.storage.atomic import replacing
from distilbeam.student.training.batches import StepRows
from distilbeam.student.training.config import LoopConfig
from distilbeam.student.training.distributed import Processes
from distilbeam.student.training.state import Tensors
from distilbeam.student.training.torchrun_folders import note_folder, remove_noted
from distilbeam.student.training.trackers import TRACKERS

FORMAT_VERSION = 1
SUFFIX, STOPPED_AT, METRICS = ".training", "stopped-at.safetensors", "metrics.jsonl"
LOCK = ".lock"
ASK_EVERY = 32  # steps after which several processes agree on whether a checkpoint is due

log = logging.getLogger(__name__)


class Resumable(Protocol):
    """The state of a training: `done` steps, and what `state.TrainingState` captures and restores."""

    done: int

    def capture(self, processes: Processes) -> tuple[Tensors, dict[str, Any]]:
        """Return the state as tensors and plain data; every process must ask for it."""

    def restore(self, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any], processes: Processes) -> None:
        """Put the state back."""


class TrainingDirectory:
    """Checkpoints of a training under way; a context that holds the directory against other trainings.

    Args:
      student: directory of the student to be.
      training: the training's configuration.
      identity: what the training is about, as plain data that JSON gives back unchanged.
      processes: who trains; the first one writes.
    """

    def __init__(self, student: Path, training: LoopConfig, identity: Mapping[str, Any], processes: Processes) -> None:
        self.path, self._name = student.with_name(student.name + SUFFIX), student.name
        self._training, self._identity, self._processes = training, json.loads(json.dumps(identity)), processes
        self._written = time.monotonic()
        self._lock: TextIO | None = None

    def __enter__(self) -> Self:
        """Hold the directory; the system lets go of it when the process ends, however it ends.

        Raises:
          ValueError: another process is at work there.
        """
        if self._processes.first:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                self._lock.close()
                raise ValueError(
                    f"{self.path} is being worked on by another process; wait for it to end or choose another directory"
                ) from e
            self._remove_left()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.close()

    def resume(self, state: Resumable) -> None:
        """Bring a new training to where the last whole checkpoint is, if there is one.

        Raises:
          ValueError: the directory is that of a training with other settings or data.
        """
        if self._processes.first and self.path.exists():
            for left in self.path.glob(".*.tmp"):
                left.unlink()
        self._processes.wait()
        found = self._last()
        if found is None:
            return
        tensors, plain = found
        if differing := differing_settings(plain["identity"], self._identity):
            raise ValueError(
                f"{self.path} holds a training that was stopped and differs in {'; '.join(differing)}. Set these back "
                "to go on with it, or remove it to start anew"
            )
        state.restore(tensors, plain, self._processes)
        log.info("going on after step %d of the training in %s", state.done, self.path)

    def _remove_left(self) -> None:
        """Remove what killed processes left of this training beside its checkpoints."""
        remove_noted(self.path)
        note_folder(self.path)
        for left in self.path.parent.glob(f".{glob.escape(self._name)}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)

    def due(self, done: int) -> bool:
        """Whether a checkpoint is due after so many steps; all processes are told the same."""
        steps = self._training.checkpoint_steps
        if steps is not None and done % steps == 0:
            return True
        if self._processes.size > 1 and done % ASK_EVERY:
            return False
        late = time.monotonic() - self._written >= self._training.checkpoint_seconds
        return bool(self._processes.from_first(late))

    def save(self, state: Resumable) -> None:
        """Write a checkpoint and remove the oldest beyond those to keep."""
        tensors, plain = state.capture(self._processes)
        if self._processes.first:
            header = {"format_version": FORMAT_VERSION, "identity": self._identity, **plain}
            with replacing(self.path / f"step-{state.done:012d}.safetensors") as temporary:
                save_file(_owned(tensors), temporary, {"state": json.dumps(header)})
            for old in self._checkpoints()[: -self._training.keep]:
                old.unlink()
        self._written = time.monotonic()

    def keep_batch(self, rows: StepRows) -> Path:
        """Write the rows of a step that went wrong, with the inputs as the student got them."""
        named = {f"soft.{name}": value for name, value in (rows.soft or {}).items()}
        if rows.hard is not None:
            named |= {"hard.inputs": rows.hard.inputs, "hard.classes": rows.hard.classes}
        path = self.path / STOPPED_AT
        if self._processes.size > 1:
            path = path.with_stem(f"{path.stem}-{self._processes.rank}")
        with replacing(path) as temporary:
            save_file(_owned(named), temporary)
        return path

    def hand_over(self, student: Path) -> None:
        """Copy the figures into the directory of the student."""
        shutil.copyfile(self.path / METRICS, student / METRICS)
        for name in TRACKERS:
            if (self.path / name).exists():
                shutil.copytree(self.path / name, student / name, symlinks=True)

    def remove(self) -> None:
        """Remove the directory, when the student is there."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        return sorted(self.path.glob("step-*.safetensors"))

    def _last(self) -> tuple[Tensors, dict[str, Any]] | None:
        """Read the newest checkpoint that is whole."""
        for path in reversed(self._checkpoints()):
            try:
                with safe_open(path, "pt") as file:
                    plain = json.loads(file.metadata()["state"])
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
                log.warning("%s is damaged and passed over: %s", path, e)
                continue
            if plain["format_version"] != FORMAT_VERSION:
                raise ValueError(
                    f"{path} has format version {plain['format_version']}, this release reads {FORMAT_VERSION}; go on "
                    f"with the release that wrote it, or remove {self.path} to start anew"
                )
            return tensors, plain
        return None


def remove_finished(root: Path) -> None:
    """Remove what killed processes left of trainings whose students are there."""
    for left in root.rglob(f"*{SUFFIX}"):
        if left.with_name(left.name.removesuffix(SUFFIX)).exists():
            shutil.rmtree(left)


def _owned(tensors: Tensors) -> Tensors:
    """Copy tensors to memory of their own on the CPU: safetensors takes no two names for one."""
    return {
        name: torch.clone(value.detach().cpu(), memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def differing_settings(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted names under which two nests of plain data differ, with both values."""
    found: list[str] = []
    for name in sorted({*there, *here}):
        old, new = there.get(name), here.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differing_settings(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} ({old!r} there, {new!r} now)")
    return found
