"""The command line: its entry, its form of failure, and the commands that carry out a run.

Every failure that a user can mend is one sentence on standard error and exit status 2 (wrong input) or 1 (work that
failed); `--debug` shows the traceback.
"""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.text import Text

import distilbeam
from distilbeam.pipelines.cli.convert import convert
from distilbeam.pipelines.cli.data import ingest
from distilbeam.pipelines.cli.label import label, plan
from distilbeam.pipelines.cli.launch import launch
from distilbeam.pipelines.cli.options import (
    BeamArgument,
    CheckContentOption,
    ConfigArgument,
    DebugOption,
    DryRunOption,
    JsonOption,
    LogOption,
    MaxFailuresOption,
    RetryOption,
    RoundOption,
    SetOption,
    TrustOption,
    WeakTeacherOption,
    console,
    end_stopped,
    errors,
    give_json,
    json_apart,
    run_steps,
    with_max_failures,
    with_weak_teacher,
)
from distilbeam.pipelines.cli.predict import predict
from distilbeam.pipelines.cli.serve import serve_student, serve_teacher
from distilbeam.pipelines.cli.settings import settings as print_settings
from distilbeam.pipelines.cli.stream import stream
from distilbeam.pipelines.cli.student import TargetArgument, evaluate_student, export, pareto, print_student, tune
from distilbeam.pipelines.cli.teacher import inspect, to_dataset, verify
from distilbeam.pipelines.cli.workers import workers
from distilbeam.pipelines.engine.display import Display, configure_logs
from distilbeam.pipelines.engine.ending import Interrupted, end_given_up
from distilbeam.pipelines.examples.registry import EXAMPLES, find_example
from distilbeam.quiet import keep_quiet, wants_everything

app = typer.Typer(
    name="distilbeam",
    help="Distil a large teacher into a small student, spending the teacher's time only where it pays.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # [teacher] in a help text is a section, no markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_INTERRUPTED = 130
TEMPLATE = "distilbeam.toml"  # what `init` writes without an example


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    if not wants_everything(arguments):
        keep_quiet()
    try:
        app(args=arguments, standalone_mode=True)
    except SystemExit as e:
        if e.code == _INTERRUPTED:  # of a command that has nothing to keep, which would end without a word
            end_stopped("stopped; the same command begins again")
        _exit(e.code if isinstance(e.code, int) else 0)
    except (ValueError, OSError) as e:
        _fail(e, 2, arguments)
    except Interrupted as e:
        end_stopped(str(e))
    except RuntimeError as e:
        _fail(e, 1, arguments)


def _fail(error: Exception, status: int, arguments: list[str]) -> None:
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--debug" in own:
        errors.print_exception()
    said = _message(error).encode("utf-8", "backslashreplace").decode()  # halves of surrogate pairs written out
    errors.print(Text.assemble(("error:", "bold red"), " ", said), soft_wrap=True)
    _exit(status)


def _exit(status: int) -> NoReturn:
    end_given_up(status)
    sys.exit(status)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"distilbeam {distilbeam.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[  # its callback ends the command
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Distil a large teacher into a small student, spending the teacher's time only where it pays."""


def _complete_example(incomplete: str) -> list[str]:
    return [name for name in EXAMPLES if name.startswith(incomplete)]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where to write; made if it is not there.")],
    example: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=_complete_example,
            help=f"Write an example with its data and teacher: {', '.join(EXAMPLES)}.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the example.")] = 0,
    debug: DebugOption = False,  # noqa: ARG001  # read from the arguments, where an error finds it
) -> None:
    """Write a commented configuration for your own data, or an example that runs."""
    configure_logs("warning", console)
    chosen = None if example is None else find_example(example)
    target = directory / (TEMPLATE if chosen is None else chosen.config)
    if target.exists():
        raise ValueError(f"{target} is there already; name another directory or remove it")
    if chosen is None:
        directory.mkdir(parents=True, exist_ok=True)
        target.write_text(resources.files("distilbeam.pipelines").joinpath("template.toml").read_text())
        what = "edit it (where your files are, which columns, which teacher), then"
        following = [f"{what} distilbeam plan {target}"]
    else:
        with Display(console).step(f"make the {example} example: data and teacher") as progress:
            chosen.write(directory, seed, progress)
        following = list(chosen.next_lines(directory))
    if len(following) == 1:
        console.print(f"Wrote {target}. Next: {following[0]}", highlight=False, soft_wrap=True)
        return
    console.print(f"Wrote {target}. Next:", highlight=False, soft_wrap=True)
    for line in following:
        console.print(f"  {line}", highlight=False, soft_wrap=True)


@app.command()
def run(
    config: ConfigArgument,
    beam_options: BeamArgument = None,
    max_failures: MaxFailuresOption = None,
    check_content: CheckContentOption = False,
    retry: RetryOption = True,
    weak_teacher: WeakTeacherOption = False,
    dry_run: DryRunOption = False,
    overrides: SetOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Do the whole run: rounds of select, label, train; then evaluate and report."""
    if dry_run:
        plan(config, beam_options, check_content=check_content, overrides=overrides, log_level=log_level)
        return
    settings = with_weak_teacher(with_max_failures(overrides, max_failures, retry), weak_teacher)
    directory = run_steps(config, beam_options, settings, log_level, None, check_content)
    _print_results(directory)
    console.print(f"Report: {directory / 'report' / 'report.html'}", highlight=False, soft_wrap=True)


def _add_step_command(name: str, description: str) -> None:
    def command(
        config: ConfigArgument,
        beam_options: BeamArgument = None,
        number: RoundOption = None,
        weak_teacher: WeakTeacherOption = False,
        overrides: SetOption = None,
        log_level: LogOption = "warning",
        debug: DebugOption = False,  # noqa: ARG001
    ) -> None:
        overrides = with_weak_teacher(overrides, weak_teacher)
        run_steps(config, beam_options, overrides, log_level, (name, number))

    app.command(name, help=f"Do what is left of a run up to {description}.")(command)


_add_step_command("select", "the choice of examples of a round")


@app.command()
def train(
    config: ConfigArgument,
    beam_options: BeamArgument = None,
    number: RoundOption = None,
    student: Annotated[
        Path | None,
        typer.Option(help="TOML file with [student] and [training] of another student, on the labels that are there."),
    ] = None,
    weak_teacher: WeakTeacherOption = False,
    overrides: SetOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Do what is left of a run up to the student after a number of rounds (0: trained on the labelled set alone)."""
    overrides = with_weak_teacher([*([] if student is None else [f"@{student}"]), *(overrides or [])], weak_teacher)
    directory = run_steps(config, beam_options, overrides, log_level, ("train", number))
    print_student(directory, number)


@app.command()
def evaluate(
    target: TargetArgument,
    beam_options: BeamArgument = None,
    data: Annotated[Path | None, typer.Option(help="Directory: labelled Parquet to evaluate on.")] = None,
    label_column: Annotated[
        str, typer.Option("--label", help="Directory: column of --data with the true class.")
    ] = "label",
    teacher: Annotated[
        Path | None, typer.Option(help="Directory: TOML file with a [teacher] section to ask too, for the agreement.")
    ] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Directory: what the teacher answered to these rows, such as run/teacher/test.")
    ] = None,
    json_file: JsonOption = None,
    trust: TrustOption = None,
    overrides: SetOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Do what is left of a run up to its figures and print the table; or evaluate a student's directory."""
    if target.is_dir():
        configure_logs(log_level, console)
        with json_apart(json_file):
            evaluate_student(target, data, label_column, teacher, answers, json_file, trust or ())
        return
    if (data, teacher, answers) != (None, None, None):
        if not target.exists():
            raise ValueError(
                f"nothing is at {target}; name a student's or an export's directory, such as run/students/round=003"
            )
        raise ValueError(f"--data, --teacher and --answers are for a student's directory; {target} is a configuration")
    with json_apart(json_file):
        _print_results(run_steps(target, beam_options, overrides, log_level, ("evaluate", None)), json_file)


@app.command()
def report(
    config: ConfigArgument,
    beam_options: BeamArgument = None,
    overrides: SetOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Do what is left of a run and draw its report again."""
    directory = run_steps(config, beam_options, overrides, log_level, None)
    from distilbeam.pipelines.steps import redraw_report  # with all that `run_steps` checks before it imports it

    redraw_report(directory)
    console.print(f"Report: {directory / 'report' / 'report.html'}", highlight=False, soft_wrap=True)


def _print_results(directory: Path, json_file: Path | None = None) -> None:
    from distilbeam.pipelines.jobs.work_log import work_table
    from distilbeam.pipelines.language.figures import UNIT
    from distilbeam.pipelines.language.report import sentences as token_sentences
    from distilbeam.pipelines.language.report import token_results_table
    from distilbeam.pipelines.report.html import calls_sentences, results_table
    from distilbeam.storage.files import read_json

    results = read_json(directory / "report" / "metrics.json")
    give_json(json_file, results)
    of_tokens = results.get("unit") == UNIT
    console.print((token_results_table if of_tokens else results_table)(results))
    console.print(work_table(results["work"]))
    for sentence in (token_sentences if of_tokens else calls_sentences)(results):
        console.print(sentence, highlight=False, soft_wrap=True)


_OTHERS = (
    plan,
    label,
    stream,
    ingest,
    launch,
    predict,
    export,
    tune,
    pareto,
    inspect,
    verify,
    to_dataset,
    convert,
    serve_teacher,
    serve_student,
)
for command in (*_OTHERS, workers):
    app.command(command.__name__.replace("_", "-"))(command)
app.command("settings")(print_settings)
