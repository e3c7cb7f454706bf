"""Train a student over Parquet files, in one process or several, from a TOML file.

    distilbeam launch training.toml
    torchrun --nproc-per-node 2 -m distilbeam launch training.toml --set training.lr=0.001

    [data]                              # paths are relative to the file
    soft_labels = ["run/labels/round=000"]
    labelled = "labelled.parquet"       # optional; so is validation
    validation = "validation.parquet"
    label = "label"
    classes = ["cat", "dog"]
    directory = "student"
    seed = 0

    [student]
    kind = "mlp"
    input = { columns = ["x"] }

    [training]
    epochs = 60

With `finetune` under [training] the distillation is blind: soft labels alone first, then the labelled examples with the
teacher's answers for them (`labelled_answers` under [data]). The same command goes on with a training that was killed. A
directory that holds the student already is left alone. `python -m distilbeam.student.launch` is the same where the command
line, which brings Beam, is not wanted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow.parquet as pq
import typer
from pydantic import Field
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from distilbeam.progress import Progress
from distilbeam.settings import SET_HELP, SET_METAVAR, Section, folder_of, read_settings, validated
from distilbeam.storage.paths import to_path
from distilbeam.student.data.labelled import with_meaning
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.blind import train_blind
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.torchrun_folders import remove_own
from distilbeam.student.training.train import TrainResult, train


class DataConfig(Section):
    """What a student is trained on, and where it goes."""

    soft_labels: tuple[str, ...] = Field((), description="directories of soft-label datasets")
    mixing_weights: tuple[float, ...] | None = Field(None, description="share of each of them in an epoch")
    labelled: str | None = Field(None, description="Parquet file of human-labelled examples")
    labelled_answers: tuple[str, ...] = Field((), description="soft labels of these examples, for training.finetune")
    validation: str | None = Field(None, description="Parquet file of labelled examples that choose the epoch")
    label: str = Field("label", description="column with the true class")
    integers: Literal["names", "indices"] | None = Field(
        None,
        description="what whole numbers in that column are, where they could be names of classes and their indices too",
    )
    classes: tuple[str, ...] = Field(description="names of the classes in the order of the logits", min_length=2)
    directory: str = Field("student", description="where the student appears")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random choice")

    def paths(self) -> tuple[str, ...]:
        """Return the names of the settings that are paths."""
        return ("soft_labels", "labelled", "labelled_answers", "validation", "directory")


class _Bar(Progress):
    def __init__(self, bars: Bars) -> None:
        self._bars, self._task = bars, bars.add_task("", total=None, note="")

    def step(self, done: int, total: int, note: str = "") -> None:
        rate = self._bars.tasks[0].speed or 0
        self._bars.update(self._task, completed=done, total=total, note=f"{note}  {rate:,.0f} steps/s")


class LaunchConfig(Section):
    """A training over Parquet files."""

    data: DataConfig
    student: StudentConfig
    training: TrainConfig = TrainConfig()


def launch(config: LaunchConfig, base: Path | None = None, progress: Progress | None = None) -> TrainResult:
    """Train what a configuration says.

    Args:
      config: the configuration.
      base: directory that relative paths start at; those of a file are absolute once it is read. The working directory
        without one.
      progress: as for `train`.

    Returns:
      The metrics and the directory of the student.

    Raises:
      ValueError: as for `train` or `train_blind`.
      FileExistsError: the student is there already.
    """
    config = config.relative_to(base or Path())
    data, student, training = config.data, config.student, config.training
    if training.reestimate_epochs is not None:
        raise ValueError(
            "training.reestimate_epochs needs the teacher's answers for the validation set, which 'distilbeam run' asks for; "
            "leave it out here"
        )
    tables = [None if path is None else pq.read_table(path) for path in (data.labelled, data.validation)]
    if data.integers is not None:
        tables = [None if table is None else with_meaning(table, data.label, data.integers) for table in tables]
    soft_labels, answers = ([to_path(path) for path in paths] for paths in (data.soft_labels, data.labelled_answers))
    common: dict[str, Any] = {
        "classes": data.classes,
        "labelled": tables[0],
        "label_column": data.label,
        "validation": tables[1],
        "directory": Path(data.directory),
        "seed": data.seed,
        "mixing_weights": data.mixing_weights,
        "progress": progress,
    }
    if training.finetune is not None:
        return train_blind(student, training, pool_labels=soft_labels, labelled_answers=answers, **common)
    if answers:
        raise ValueError(
            "data.labelled_answers are for the second phase of blind distillation: give training.finetune too"
        )
    return train(student, training, soft_labels=soft_labels, **common)


def read_config(path: Path, overrides: Sequence[str] = ()) -> LaunchConfig:
    """Read and validate the configuration of a training; see `distilbeam.settings`.

    Args:
      path: the TOML file.
      overrides: words `section.key=value`, or `@FILE`.

    Returns:
      The configuration, with absolute paths.

    Raises:
      ValueError: it cannot be read, or a setting is not valid; a line for each.
    """
    return validated(LaunchConfig, read_settings(path, overrides)).relative_to(folder_of(path))


def train_file(config: Path, overrides: Sequence[str], progress: Progress) -> TrainResult:
    """Train what a file says; see `launch` and `read_config`."""
    return launch(read_config(config, overrides), progress=progress)


TrainFile = Callable[[Path, Sequence[str], Progress], TrainResult]


def launch_file(config: Path, overrides: Sequence[str] = (), train_it: TrainFile = train_file) -> None:
    """Train what a file says, as one of the processes that torchrun started or alone; the first shows how it goes.

    Args:
      config: the TOML file.
      overrides: as for `read_config`.
      train_it: trains what a file of the kind says.

    Raises:
      ValueError, OSError: as for `train_it`.
    """
    signal.signal(signal.SIGINT, _stop_at_once)
    first = os.environ.get("RANK", "0") == "0"
    columns = (
        TextColumn("  {task.fields[note]}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, transient=True, disable=not (first and sys.stdout.isatty())) as bars:
        result = train_it(config, overrides, _Bar(bars))
    if first:
        remove_own()
        width = max(map(len, result.metrics), default=0)
        figures = (f"  {name:<{width}}  {round(value, 4)}" for name, value in result.metrics.items())
        typer.echo("\n".join([str(result.directory), *figures]))


def main(
    config: Annotated[Path, typer.Argument(help="Configuration file (TOML).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar=SET_METAVAR, help=SET_HELP, show_default=False)
    ] = None,
) -> None:
    """Train a student over Parquet files, alone or, started by torchrun, in several processes."""
    try:
        launch_file(config, overrides or ())
    except (ValueError, OSError) as e:
        typer.echo(f"error: {e}", err=True)
        raise SystemExit(2) from e


def _stop_at_once(*_: object) -> None:
    """End at once: checkpoints are whole or not there."""
    if os.environ.get("RANK", "0") == "0":
        typer.echo("stopped; the same command goes on from the last checkpoint", err=True)
    os._exit(130)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(main)
    app()
