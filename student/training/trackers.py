"""Experiment trackers: TensorBoard, MLflow and Weights & Biases, by their own packages, into a folder and without a network.

A tracker writes into a folder of its name beside the checkpoints, which goes with the student: `tensorboard --logdir`, `mlflow ui
--backend-store-uri sqlite:///student/mlflow/mlflow.db`, `wandb sync student/wandb/*/wandb/offline-run-*`.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from distilbeam.student.training.config import LoopConfig

TRACKERS = ("tensorboard", "mlflow", "wandb")


class Tracker(Protocol):
    """Takes figures of steps."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Take the figures of a step."""

    def close(self) -> None:
        """Write what is left."""


def trackers_of(training: LoopConfig) -> tuple[str, ...]:
    """Name the trackers that a configuration asks for; `tensorboard = true` is the former way to ask for that one."""
    wanted = {training.track, "tensorboard" if training.tensorboard else None}
    return tuple(name for name in TRACKERS if name in wanted)


def open_tracker(name: str, directory: Path, done: int, settings: Mapping[str, Any]) -> Tracker:
    """Open a tracker.

    Args:
      name: one of `TRACKERS`.
      directory: the training's folder.
      done: steps done before, by a process that was stopped.
      settings: of the training, which the tracker keeps beside the figures.

    Raises:
      ValueError: its package is not installed.
    """
    makers: dict[str, type[_TensorBoard] | type[_Mlflow] | type[_Wandb]] = {
        "tensorboard": _TensorBoard,
        "mlflow": _Mlflow,
        "wandb": _Wandb,
    }
    try:
        return makers[name](directory / name, done, settings)
    except ImportError as e:
        raise ValueError(
            f"training.track = '{name}' needs its package; pip install 'distilbeam[{name}]' or leave it out"
        ) from e


class _TensorBoard:
    def __init__(self, folder: Path, done: int, _: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=done + 1)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Mlflow:
    def __init__(self, folder: Path, _: int, settings: Mapping[str, Any]) -> None:
        from mlflow.tracking import MlflowClient  # the client alone: no global run of the user's is touched

        for noisy in ("mlflow", "alembic"):  # which tell every table that they make
            logging.getLogger(noisy).setLevel(logging.WARNING)
        folder.mkdir(exist_ok=True)
        self._client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
        remembered = folder / "run"
        if remembered.exists():  # a training that was stopped goes on in its run
            self._run = remembered.read_text()
            return
        found = self._client.get_experiment_by_name("distilbeam")
        experiment = self._client.create_experiment("distilbeam") if found is None else found.experiment_id
        self._run = self._client.create_run(experiment).info.run_id
        for name, value in settings.items():
            self._client.log_param(self._run, name, value)
        remembered.write_text(self._run)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _Wandb:
    def __init__(self, folder: Path, done: int, settings: Mapping[str, Any]) -> None:
        import wandb

        # wandb names a process's files by the second in which it began: one that goes on at once would overwrite the first's
        part = folder / f"from-{done}"
        part.mkdir(parents=True, exist_ok=True)
        remembered = folder / "run"
        if not remembered.exists():
            remembered.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project="distilbeam",
            dir=str(part),
            mode="offline",  # whatever WANDB_MODE says: nothing leaves this machine but by `wandb sync`
            id=remembered.read_text(),  # a training that was stopped goes on in its run
            resume="allow",
            reinit="create_new",  # the user's own run, if there is one, stays the active one
            config=dict(settings),
            save_code=False,
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, x_disable_stats=True, x_disable_meta=True
            ),
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()
