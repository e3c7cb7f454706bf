"""The commands that spend the teacher's time, and the one that says beforehand how much: `label` and `plan`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from distilbeam.pipelines.cli.data import watch_directory
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
    check_early,
    console,
    give_json,
    json_apart,
    run_steps,
    stop_at_once,
    with_max_failures,
)
from distilbeam.pipelines.engine.display import Display, configure_logs
from distilbeam.pipelines.engine.forkserver import begin


def label(
    config: ConfigArgument,
    beam_options: BeamArgument = None,
    number: RoundOption = None,
    relabel: Annotated[
        bool, typer.Option("--relabel", help="Set labels of another teacher or form aside and label again.")
    ] = False,
    watch: Annotated[
        Path | None, typer.Option(help="Go on labelling the Parquet files that arrive in this directory.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Drop the labels of files that are gone from the pool.")
    ] = False,
    check_content: CheckContentOption = False,
    max_failures: MaxFailuresOption = None,
    trust: TrustOption = None,
    retry: RetryOption = True,
    dry_run: DryRunOption = False,
    overrides: SetOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Label what has no label: the whole pool of a labelling job, or a run's choice of a round."""
    configure_logs(log_level, console)
    if dry_run:
        if watch is not None:
            raise ValueError(
                "--dry-run is for what is there already, --watch labels what arrives: leave one of them out"
            )
        plan(config, beam_options, check_content=check_content, overrides=overrides, log_level=log_level)
        return
    begin(beam_options or [])
    overrides = with_max_failures(overrides, max_failures, retry)
    settings = _settings(config, overrides)
    from distilbeam.pipelines.config import LabelConfig

    if not isinstance(settings, LabelConfig):
        if watch is not None:
            raise ValueError(
                f"--watch is for labelling jobs, {config} describes a run: leave out [selection], [student] and [training]"
            )
        if prune:
            raise ValueError("--prune is for labelling jobs, whose pool may lose files: leave it out")
        if relabel:
            raise ValueError(
                "--relabel is for labelling jobs: a run belongs to one teacher, choose another run.directory"
            )
        run_steps(config, beam_options, overrides, log_level, ("label", number))
        return
    if number is not None:
        raise ValueError(f"--round is for runs, {config} describes a labelling job: it has no rounds")
    if watch is not None and settings.labels_tokens:
        raise ValueError(
            f"--watch is for teachers of classes, got teacher.kind = '{settings.teacher.kind}'; ingest what has arrived into the pool and "
            "label that, which asks for nothing twice"
        )
    if watch is not None and (prune or check_content):
        raise ValueError("--prune and --check-content are for a pool, --watch labels what arrives: leave them out")
    if trust:
        from distilbeam.student.trust import trust as trust_code

        trust_code(*trust)
    if watch is not None:
        watch_directory(settings, watch, beam_options or [])
        return
    how = {"prune": prune, "check_content": check_content, "retry": settings.engine.retry}
    _label_pool(settings, beam_options or [], relabel, how)


def plan(
    config: ConfigArgument,
    beam_options: BeamArgument = None,
    sample: Annotated[
        int,
        typer.Option(
            min=0, help="Rows to ask the teacher about, to measure time and bytes; the answers are kept as labels."
        ),
    ] = 0,
    check_content: CheckContentOption = False,
    json_file: JsonOption = None,
    overrides: SetOption = None,
    log_level: LogOption = "warning",
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """Say what is left of a run or a labelling job and what it will cost, before anything is spent."""
    with json_apart(json_file):
        configure_logs(log_level, console)
        _plan(_settings(config, overrides), beam_options or [], sample, check_content, json_file)


def _plan(settings: Any, flags: list[str], sample: int, check_content: bool, json_file: Path | None) -> None:
    check_early(settings, flags)
    with Display(console).waiting("loading"):
        from distilbeam.pipelines.config import LabelConfig
        from distilbeam.pipelines.engine.beam_options import pipeline_options
        from distilbeam.pipelines.forecast.forecast import forecast_labelling, forecast_run
        from distilbeam.pipelines.forecast.token_forecast import forecast_token_run, token_sentences
        from distilbeam.pipelines.jobs.distillation import Job
        from distilbeam.pipelines.jobs.set_notes import notes_on, require_different_sets
        from distilbeam.pipelines.steps import job_of

    options = pipeline_options(flags)
    if isinstance(settings, LabelConfig):
        with _job(settings, held=sample > 0) as job:
            label_plan = job.plan(check_content=check_content)
            sentences = [*plan_sentences(label_plan), *job.token_sentences(label_plan.rows_wanted)]
            forecast = forecast_labelling(job, label_plan, options, sample)
    else:
        with _run_directory(settings, held=sample > 0) as directory:
            run_job = job_of(settings, directory, options)
            if isinstance(run_job, Job):
                require_different_sets(run_job.run.inputs)
                notes = notes_on(run_job.run.inputs, settings.data.id)
                sentences, forecast = [f"note: {note}" for note in notes], forecast_run(run_job, sample)
            else:
                sentences, forecast = [*token_sentences(run_job)], forecast_token_run(run_job, sample)
    give_json(json_file, forecast.to_json())
    for sentence in sentences:
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    _print_forecast(forecast)


def plan_sentences(plan: Any) -> list[str]:
    """Say what a labelling job's plan keeps, drops and labels, and why."""
    standing, changes = plan.standing, plan.changes
    sentences = [
        f"The pool has {plan.pool.rows:,} rows in {len(plan.pool.files):,} file(s); {plan.rows_labelled:,} are labelled, "
        f"{plan.rows_wanted:,} are not."
    ]
    for what in ("new", "changed", "gone"):
        names = [name for name, change in changes.items() if change == what]
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
            sentences.append(f"{len(names):,} file(s) {what}: {shown}.")
    facts = (
        (plan.rows_copied, "rows ask what was answered already: the answers are copied."),
        (plan.rows_waiting, "rows ask what other rows ask: they are not asked, but get their answers."),
        (plan.rows_same, "rows are the same as others, id and content, and are kept once."),
        (plan.rows_saved, "rows were answered before a call was stopped: they are not asked again."),
        (
            plan.rows_dead,
            "rows had no answer before (see the dead letters); 'label' asks them again, with --no-retry not.",
        ),
        (standing.rows_gone, "labels are of files that are gone; they are kept until 'label --prune'."),
        (standing.rows_dropped, "labels are of rows that are no longer in the pool and are dropped."),
    )
    sentences += [f"{rows:,} {said}" for rows, said in facts if rows]
    if not plan.compared:
        sentences.append(
            f"{plan.rows_wanted:,} rows are more than engine.compare_rows: identical ones among them are each asked."
        )
    if plan.because:
        sentences.append(
            f"{plan.superseded:,} labels differ in {', '.join(plan.because)}; 'label --relabel' sets them aside."
        )
    return sentences


@contextmanager
def _job(settings: Any, *, held: bool) -> Iterator[Any]:
    """Give a labelling job, held where something is to be kept in its directory."""
    from distilbeam.pipelines.jobs.labelling import LabellingJob

    with _run_directory(settings, held=held) as directory:
        yield LabellingJob(settings, directory)


@contextmanager
def _run_directory(settings: Any, *, held: bool) -> Iterator[Any]:
    """Give a run directory, made and held where something is to be kept in it."""
    from distilbeam.pipelines.jobs.opening import opened_run, planned_run

    if not held:
        yield planned_run(settings)
        return
    with opened_run(settings) as directory:
        yield directory


def _settings(config: Path, overrides: list[str] | None) -> Any:
    from distilbeam.pipelines.config import load_any_config

    return load_any_config(config, overrides or ())


def _label_pool(settings: Any, flags: list[str], relabel: bool, how: dict[str, bool]) -> None:
    check_early(settings, flags)
    with Display(console).waiting("loading"):
        from distilbeam.pipelines.engine.beam_options import pipeline_options
        from distilbeam.pipelines.jobs.labelling import opened_job, write_metrics
        from distilbeam.pipelines.jobs.work_log import work_table

    display, options = Display(console), pipeline_options(flags)
    signal.signal(signal.SIGINT, stop_at_once)
    with opened_job(settings) as job:
        with display.step("read the pool and load the teacher"):
            plan = job.plan(**how)
        for sentence in plan_sentences(plan):
            display.say(sentence)
        with display.step(f"label {plan.rows_asked:,} rows") as progress:
            done = job.label(plan, options, progress, relabel=relabel, **how)
        metrics = write_metrics(job, plan, done)
    if metrics["work"]:
        console.print(work_table(metrics["work"]))
    if metrics["failed"]:
        display.say(f"{metrics['failed']:,} rows have no label; why, is in {job.dead_letters}")
    console.print(f"Labels: {job.dataset}", highlight=False, soft_wrap=True)


def _print_forecast(forecast: Any) -> None:
    from distilbeam.pipelines.forecast.rates import forecast_table, money_sentence

    if not forecast.total.rows:
        console.print("Nothing is left to choose or to ask the teacher.")
        return
    console.print(forecast_table(forecast))
    workers = f"{forecast.workers} worker(s)"
    if forecast.sampled:
        console.print(
            f"Measured on {forecast.sampled:,} rows that the teacher was asked about, whose labels are kept; for {workers}.",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(
            f"Nothing was asked: times and bytes are not known, 'plan --sample 1024' measures them; for {workers}.",
            highlight=False,
            soft_wrap=True,
        )
    if (sentence := money_sentence(forecast)) is not None:
        console.print(sentence, highlight=False, soft_wrap=True)
