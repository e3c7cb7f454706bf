"""The options that commands share, and the carrying out of a run's steps."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distilbeam.pipelines.engine.display import Display, configure_logs, plain_console
from distilbeam.pipelines.engine.ending import end_running, interrupt
from distilbeam.pipelines.engine.forkserver import begin
from distilbeam.settings import SET_HELP, SET_METAVAR

if TYPE_CHECKING:
    from distilbeam.pipelines.config import LabelConfig, RunConfig, TokenRunConfig

console = plain_console()
errors = plain_console(stderr=True)
_STREAM = Path("-")
_PATIENCE_S = 30.0  # for a request in flight

ConfigArgument = Annotated[Path, typer.Argument(help="Configuration file (TOML).", show_default=False)]
BeamArgument = Annotated[
    list[str] | None, typer.Argument(metavar="-- BEAM OPTIONS", help="Beam's own options.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar=SET_METAVAR,
        help=SET_HELP,
    ),
]
RoundOption = Annotated[
    int | None, typer.Option("--round", min=0, help="Number of the round; the first unfinished one by default.")
]
MaxFailuresOption = Annotated[
    int | None, typer.Option(min=0, help="Stop when more rows than this have no answer (engine.max_failures).")
]
WeakTeacherOption = Annotated[
    bool,
    typer.Option(
        "--accept-weak-teacher", help="Buy labels of a teacher no better than student 0 (run.accept_weak_teacher)."
    ),
]
CheckContentOption = Annotated[
    bool,
    typer.Option(
        "--check-content", help="Compare all rows with what was labelled, not only those of files touched since."
    ),
]
TrustOption = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="MODULE", help="Module whose code a student's folder may call; may be repeated."),
]
InputColumnOption = Annotated[
    str | None,
    typer.Option(
        help="Column of the texts or images, for a Hugging Face folder, which does not say it; 'text' or 'image' without it."
    ),
]
RetryOption = Annotated[
    bool,
    typer.Option("--retry/--no-retry", help="Ask again about the rows that had no answer before (engine.retry)."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what is left and what it will cost, as plan does; do nothing.")
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json", help="Write the figures to this file; '-': to standard output, and all else to standard error."
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
LogOption = Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")]


def run_steps(
    config: Path,
    flags: list[str] | None,
    overrides: list[str] | None,
    log_level: str,
    until: tuple[str, int | None] | None,
    check_content: bool = False,
) -> Path:
    """Do what is left of a run up to a step; return the run directory."""
    configure_logs(log_level, console)
    begin(flags or [])
    from distilbeam.pipelines.config import load_run_config

    settings = load_run_config(config, overrides or ())
    check_early(settings, flags or ())
    with Display(console).waiting("loading"):
        from distilbeam.pipelines.steps import run
    signal.signal(signal.SIGINT, stop_at_once)
    return run(
        settings,
        beam_flags=flags or (),
        display=Display(console),
        until=until,
        check_content=check_content,
    )


def check_early(settings: RunConfig | TokenRunConfig | LabelConfig, flags: Sequence[str]) -> None:
    """Check what needs no torch, which takes seconds to import, and of Beam its options alone.

    Raises:
      ValueError: an extra is not installed, the run directory belongs to another configuration, or Beam does not know a
        flag.
    """
    from distilbeam.extras import require_extras
    from distilbeam.pipelines.jobs.opening import check_former
    from distilbeam.pipelines.needs import needs_of

    require_extras(needs_of(settings))
    check_former(settings)
    with Display(console).waiting("loading"):
        from distilbeam.pipelines.engine.beam_options import pipeline_options

        pipeline_options(flags)


@contextmanager
def json_apart(file: Path | None) -> Iterator[None]:
    """Keep standard output for the figures alone where `--json -` asks for them there: all else goes to standard error."""
    former = console.stderr
    console.stderr = former or file == _STREAM
    try:
        yield
    finally:
        console.stderr = former


def give_json(file: Path | None, found: Any) -> None:
    """Write figures where `--json` says; before any table, for whoever reads these may have had enough."""
    if file is None:
        return
    if file == _STREAM:
        print(json.dumps(found, indent=2, sort_keys=True), flush=True)
        return
    from distilbeam.storage.files import write_json

    write_json(file, found)


def stop_at_once(*_: object) -> None:
    """End as soon as what the teacher was asked is kept; at once where nobody is asked, or when told a second time.

    Every file is whole or not there, and runners turn a KeyboardInterrupt into errors of their own.
    """
    if not interrupt():
        end_stopped("stopped; the same command goes on from here")
    patience = threading.Timer(_PATIENCE_S, end_stopped, ["stopped; the same command goes on from here"])
    patience.daemon = True
    patience.start()


def end_stopped(sentence: str) -> None:
    """Say so and end, and what is at work elsewhere with it."""
    end_running()
    console.show_cursor(True)
    errors.print(sentence, highlight=False, soft_wrap=True)
    os._exit(130)


def with_weak_teacher(overrides: list[str] | None, accepted: bool) -> list[str]:
    """Add the option `--accept-weak-teacher` to the settings that are overridden."""
    return [*(overrides or []), *(["run.accept_weak_teacher=true"] if accepted else [])]


def with_max_failures(overrides: list[str] | None, limit: int | None, retry: bool = True) -> list[str]:
    """Add the options `--max-failures` and `--no-retry` to the settings that are overridden."""
    limited = [] if limit is None else [f"engine.max_failures={limit}"]
    return [*(overrides or []), *limited, *([] if retry else ["engine.retry=false"])]
