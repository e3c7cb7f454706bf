"""The command that trains over Parquet files without a run: `launch`, which torchrun starts in several processes."""

from __future__ import annotations

from distilbeam.pipelines.cli.options import ConfigArgument, DebugOption, LogOption, SetOption, console
from distilbeam.pipelines.engine.display import configure_logs


def launch(
    config: ConfigArgument,
    overrides: SetOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001  # read from the arguments, where an error finds it
) -> None:
    """Train a student, or a language model, over Parquet files; 'torchrun --nproc-per-node 2 -m distilbeam launch CONFIG' in several processes."""
    configure_logs(log_level, console)
    from distilbeam.settings import read_settings
    from distilbeam.student.language.config import CAUSAL_LM
    from distilbeam.student.training.launch import launch_file  # torch takes seconds to import

    student = read_settings(config, overrides or ()).get("student")
    if isinstance(student, dict) and student.get("kind") == CAUSAL_LM:
        from distilbeam.student.language.launch import train_file

        launch_file(config, overrides or (), train_file)
    else:
        launch_file(config, overrides or ())
