"""The commands about students: `export`, `tune`, `pareto`, and the evaluation of a student's directory."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distilbeam.pipelines.cli.options import (
    ConfigArgument,
    DebugOption,
    LogOption,
    SetOption,
    TrustOption,
    console,
    give_json,
    stop_at_once,
)
from distilbeam.pipelines.engine.display import Display, configure_logs

if TYPE_CHECKING:
    from distilbeam.pipelines.jobs.run import Run

TargetArgument = Annotated[
    Path,
    typer.Argument(
        metavar="STUDENT",
        help="A student's directory, or the configuration of a run, for its last student.",
        show_default=False,
    ),
]


def export(
    student: TargetArgument,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="pt2, onnx, int8, int8-weights or pruned; may be repeated. All but pruned if not given."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the exports; beside the student if not given.")
    ] = None,
    number: Annotated[
        int | None, typer.Option("--round", min=0, help="Configuration: the student of this round.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Directory: Parquet of the pool, for int8; never the test set.")
    ] = None,
    calibration_rows: Annotated[int, typer.Option(min=1, help="Examples to calibrate on.")] = 1024,
    data: Annotated[Path | None, typer.Option(help="Directory: labelled Parquet to evaluate on.")] = None,
    label: Annotated[str, typer.Option(help="Directory: column of --data with the true class.")] = "label",
    trust: TrustOption = None,
    ratio: Annotated[float, typer.Option(help="pruned: share of the channels to take away.")] = 0.5,
    recovery: Annotated[float, typer.Option(help="pruned: share of training.epochs to train for afterwards.")] = 0.3,
    overrides: SetOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Export a student for deployment, and compare the exports in one table."""
    configure_logs(log_level, console)
    signal.signal(signal.SIGINT, stop_at_once)
    with Display(console).waiting("loading"):
        from distilbeam.pipelines.experiments.exports import check_formats
        from distilbeam.student.export.export import FORMATS
        from distilbeam.student.trust import trust as trust_code
    trust_code(*(trust or ()))
    wanted = list(formats or FORMATS)
    check_formats(wanted)
    if _is_config(student):
        _refuse_for_configuration(calibrate=calibrate, data=data)
        with _opened_run(student, overrides) as run:
            _export_of_run(run, wanted, output, number, calibration_rows, ratio, recovery)
    else:
        _refuse_for_directory(overrides, number)
        _export_of_directory(student, wanted, output, calibrate, calibration_rows, data, label)


def tune(
    config: ConfigArgument,
    trials: Annotated[int | None, typer.Option(min=1, help="Trainings in all; tune.trials if not given.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be tried; train nothing.")] = False,
    overrides: SetOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Search for better settings of a run's student and training; a search that was stopped goes on."""
    configure_logs(log_level, console)
    signal.signal(signal.SIGINT, stop_at_once)
    from distilbeam.extras import require_extras
    from distilbeam.pipelines.needs import needs_of_search

    require_extras(needs_of_search())
    more = [] if trials is None else [f"tune.trials={trials}"]
    with _opened_run(config, [*(overrides or []), *more]) as run:
        from distilbeam.pipelines.experiments.tune import plan_search
        from distilbeam.pipelines.experiments.tune import tune as tune_run
        from distilbeam.pipelines.report.tables import trial_table

        if dry_run:
            console.print(plan_search(run), highlight=False, soft_wrap=True)
            return
        found = tune_run(run, Display(console))
        console.print(trial_table(found, run.config.tune.metric))
        best = run.directory.root / "tune" / "best.toml"
    words = [word for value in [*(overrides or []), f"@{best}"] for word in ("--set", value)]
    again = shlex.join(["distilbeam", "run", str(config), *words])
    console.print(
        f"Best settings: {best}. A student of these on the labels that are there: {again}",
        highlight=False,
        soft_wrap=True,
    )


def pareto(
    config: ConfigArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what students would be made; make none.")] = False,
    overrides: SetOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Make students of several sizes, shrunk and then improved, or grown, improved and shrunk; show which are worth having."""
    configure_logs(log_level, console)
    signal.signal(signal.SIGINT, stop_at_once)
    with _opened_run(config, overrides) as run:
        from distilbeam.pipelines.experiments.pareto import plan_sweep, sweep_widths
        from distilbeam.pipelines.report.tables import PARETO_COLUMNS, console_table, pareto_rows

        if dry_run:
            console.print(plan_sweep(run), highlight=False, soft_wrap=True)
            return
        results = sweep_widths(run, Display(console))
        title = f"Accuracy against {results['cost']}; the front is that of the validation set"
        console.print(console_table(title, PARETO_COLUMNS, pareto_rows(results)))
        _redraw(run)
        picture = run.directory.root / "pareto" / "pareto.png"
    console.print(f"Plot: {picture}", highlight=False, soft_wrap=True)


def print_student(root: Path, number: int | None) -> None:
    """Say where a run's students stand: the one of a round, or the last, and what it learned from."""
    import json

    names = sorted(path.name for path in (root / "students").glob("round=*") if path.suffix != ".training")
    name = f"round={number:03d}" if number is not None else names[-1]
    student = root / "students" / name
    figures = json.loads((student / "student.json").read_text())["extra"]["metrics"]
    if "soft_rows" not in figures:
        _print_language_model(student, figures)
        return
    measured = ""
    if "validation_accuracy" in figures:
        measured = f"accuracy {figures['validation_accuracy']:.1%} and NLL {figures['validation_nll']:.3f} on the validation set, "
    console.print(
        f"Student of round {int(name.removeprefix('round=')):,}: {measured}epoch {figures['best_epoch']:,} of "
        f"{figures['epochs']:,}, from {figures['soft_rows']:,} labels of the teacher and {figures['hard_rows']:,} human ones.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Its directory: {student}", highlight=False, soft_wrap=True)


def _print_language_model(student: Path, figures: dict[str, Any]) -> None:
    """Say where a language model of a run stands: student 0 has not learned anything yet."""
    learned = "with the weights that it begins with"
    if "tokens" in figures:
        passes = f"{figures['epochs']:,} pass(es) over {figures['tokens'] // figures['epochs']:,} labelled tokens"
        learned = f"after {passes}, {figures['validation_bits_per_byte']:.3f} bits per byte on the validation blocks"
    console.print(f"Language model {student}: {learned}.", highlight=False, soft_wrap=True)


def evaluate_student(
    directory: Path,
    data: Path | None,
    label: str,
    teacher: Path | None,
    answers: Path | None,
    json_file: Path | None,
    trust: Sequence[str] = (),
) -> None:
    """Evaluate a student's or an export's directory on labelled Parquet, class by class."""
    if data is None:
        raise ValueError(
            f"--data must name labelled Parquet to evaluate {directory} on, of a language model a directory of token labels; a "
            "configuration has its own"
        )
    from distilbeam.pipelines.prediction.opened_model import is_run, kept_in
    from distilbeam.student.language.folder import is_language_model

    directory = kept_in(directory) if is_run(directory) else directory
    if is_language_model(directory):
        _evaluate_language_model(directory, data, json_file, trust)
        return
    with Display(console).waiting("loading"):
        from distilbeam.pipelines.experiments.evaluate import evaluate_directory
        from distilbeam.pipelines.report.tables import EXPORT_COLUMNS, class_table, console_table, export_rows
        from distilbeam.student.trust import trust as trust_code
    trust_code(*trust)
    with Display(console).step(f"evaluate {directory}"):
        found = evaluate_directory(directory, data, label, teacher, answers)
    give_json(json_file, found)
    console.print(console_table(f"On {data}, one thread", EXPORT_COLUMNS, export_rows([found], "data")))
    console.print(class_table(found["classes"], found["worst"]))


def _evaluate_language_model(directory: Path, data: Path, json_file: Path | None, trust: Sequence[str]) -> None:
    """Measure a language model on token labels: a line for each figure."""
    with Display(console).step(f"evaluate {directory}"):
        from distilbeam.student.language.evaluate import evaluate_language_model

        found = evaluate_language_model(directory, data, trust)
    give_json(json_file, found)
    from distilbeam.pipelines.report.tables import console_table

    rows = [
        (name.replace("_", " "), f"{value:,.0f}" if value == int(value) else f"{value:.4f}")
        for name, value in found.items()
        if not isinstance(value, str)
    ]
    console.print(console_table(f"On {data}", ("figure", "value"), rows))
    added = found["continued"].removeprefix(found["given"])
    console.print(f"Given {found['given']!r}, it goes on {added!r}", highlight=False, markup=False, soft_wrap=True)


def _is_config(target: Path) -> bool:
    return not target.is_dir()


@contextmanager
def _opened_run(config: Path, overrides: list[str] | None) -> Iterator[Run]:
    """Hold a configuration's run directory and give the run."""
    with Display(console).waiting("loading"):
        from distilbeam.extras import require_extras
        from distilbeam.pipelines.config import load_config
        from distilbeam.pipelines.jobs.freeze import require_data_of_run
        from distilbeam.pipelines.jobs.opening import opened_run
        from distilbeam.pipelines.jobs.run import Run
        from distilbeam.pipelines.needs import needs_of
    settings = load_config(config, overrides or ())
    require_extras(needs_of(settings))
    with opened_run(settings) as directory:
        if (sentence := directory.sentence(settings.run.rounds)) is not None:
            Display(console).say(sentence)
        run = Run(settings, directory)
        if directory.moved:
            require_data_of_run(run)
        yield run


def _export_of_run(
    run: Run,
    formats: list[str],
    output: Path | None,
    number: int | None,
    rows: int,
    ratio: float,
    recovery: float,
) -> None:
    from distilbeam.pipelines.experiments.exports import write_exports
    from distilbeam.pipelines.experiments.further_students import judge_on_run, train_further
    from distilbeam.pipelines.experiments.model_metrics import pool_examples
    from distilbeam.pipelines.jobs.final_result import final_student, learns_validation
    from distilbeam.pipelines.jobs.kept_student import kept_student
    from distilbeam.pipelines.report.cards import run_facts

    final = final_student(run) if number is None else None
    student = final or kept_student(run, number)
    learned = final is not None and learns_validation(run)
    training = run.config.training
    short = training.model_copy(update={"epochs": max(1, round(recovery * training.epochs))})
    where = output or run.directory.root / "exports" / (student.name if final is None else final.parent.name)
    table = write_exports(
        student,
        formats,
        where,
        partial(judge_on_run, run, learned_validation=learned),
        Display(console),
        pool_examples(run.inputs.pool, run.student_config().input, rows, run.config.run.seed),
        {"pool": run.config.dump()["data"]["pool"], "seed": run.config.run.seed},
        run.provenance(None if final is not None else student),
        lambda config, init, directory, progress: train_further(run, config, short, directory, progress, init=init),
        ratio,
        run_facts(run),
    )
    _print_exports(table, "validation" if run.config.data.test is None else "test", where)
    _redraw(run)


def _export_of_directory(
    student: Path,
    formats: list[str],
    output: Path | None,
    calibrate: Path | None,
    rows: int,
    data: Path | None,
    label: str,
) -> None:
    from distilbeam.pipelines.experiments.evaluate import judge_of
    from distilbeam.pipelines.experiments.exports import write_exports
    from distilbeam.pipelines.experiments.model_metrics import pool_examples
    from distilbeam.pipelines.pool.pool_files import find_files
    from distilbeam.pipelines.pool.splits import plan_units
    from distilbeam.student.checkpoint import load_student

    examples, origin = None, None
    config = load_student(student).config.input
    if calibrate is not None:
        pool = plan_units(find_files(calibrate, "--calibrate"), 2**18, "--calibrate")
        examples, origin = pool_examples(pool, config, rows, 0), {"pool": str(calibrate), "seed": 0}
    elif "int8" in formats:
        raise ValueError(
            "--format int8 needs examples to calibrate on: give it some of the pool with --calibrate POOL.parquet, or the "
            "run's configuration instead of the student's directory, or leave the format out"
        )
    where = output or student.with_name(f"{student.name}-exports")
    table = write_exports(student, formats, where, judge_of(data, label), Display(console), examples, origin)
    _print_exports(table, "data" if data is not None else None, where)


def _print_exports(table: list[dict[str, Any]], evaluated_on: str | None, where: Path) -> None:
    from distilbeam.pipelines.report.tables import EXPORT_COLUMNS, console_table, export_rows

    quality = "" if evaluated_on is None else f"Quality on the {evaluated_on} set; "
    title = f"{quality}latency and memory in a fresh process with one thread"
    console.print(console_table(title, EXPORT_COLUMNS, export_rows(table, evaluated_on)))
    for folder in (where / row["name"] for row in table):
        if folder.is_dir():  # the first row is the student itself
            console.print(f"Export: {folder}", highlight=False, soft_wrap=True)


def _redraw(run: Run) -> None:
    if run.directory.metrics.exists():
        from distilbeam.pipelines.steps import redraw_report

        redraw_report(run.directory.root)


def _refuse_for_configuration(**options: Path | None) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name} is for a student's directory; a configuration names its own data")


def _refuse_for_directory(overrides: list[str] | None, number: int | None) -> None:
    if overrides or number is not None:
        raise ValueError("--set and --round are for a configuration, got a student's directory")
