"""The command that trains over Parquet files without a run: `launch`, which torchrun starts in several processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from distilbeam.pipelines.cli.options import ConfigArgument, DebugOption, LogOption, SetOption, console
from distilbeam.pipelines.engine.display import configure_logs


def launch(
    config: ConfigArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be learned, and what is there already; train nothing.")
    ] = False,
    overrides: SetOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001  # read from the arguments, where an error finds it
) -> None:
    """Train a student, or a language model, over Parquet files; 'torchrun --nproc-per-node 2 -m distilbeam launch CONFIG' in several processes."""
    configure_logs(log_level, console)
    from distilbeam.settings import read_settings
    from distilbeam.student.language.config import CAUSAL_LM
    from distilbeam.student.training.launch import launch_file  # torch takes seconds to import

    settings = read_settings(config, overrides or ())
    _require_training(config, settings)
    student = settings.get("student")
    if dry_run:
        _say_plan(config, overrides or (), isinstance(student, dict) and student.get("kind") == CAUSAL_LM)
        return
    if isinstance(student, dict) and student.get("kind") == CAUSAL_LM:
        from distilbeam.student.language.launch import train_file

        launch_file(config, overrides or (), train_file)
    else:
        launch_file(config, overrides or ())


def _say_plan(config: Path, overrides: Sequence[str], of_tokens: bool) -> None:
    from distilbeam.settings import folder_of, read_settings, validated
    from distilbeam.student.language.config import TokenLaunchConfig
    from distilbeam.student.training.launch import read_config
    from distilbeam.student.training.launch_plan import plan_launch

    if of_tokens:
        token = validated(TokenLaunchConfig, read_settings(config, overrides)).relative_to(folder_of(config))
        said = plan_launch(
            token.data.soft_labels,
            None,
            token.data.directory,
            token.training.epochs,
            token.training.batch_size,
            "block",
        )
    else:
        found = read_config(config, overrides)
        data, training = found.data, found.training
        said = plan_launch(data.soft_labels, data.labelled, data.directory, training.epochs, training.batch_size)
    console.print(said, soft_wrap=True)


def _require_training(config: Path, settings: Mapping[str, Any]) -> None:
    """Check that a file describes a training: those of runs and labelling jobs have commands of their own."""
    if "run" in settings and "selection" in settings:
        what, command = "a run", "run"
    elif "teacher" in settings and "student" not in settings:
        what, command = "a labelling job", "label"
    else:
        return
    raise ValueError(
        f"{config} describes {what}: 'distilbeam {command} {config}' does it; launch is for a training of labels that are there, "
        "soft_labels in [data] beside [student] and [training]"
    )
