"""Forecasts of labelling jobs and of runs: the steps that are left, priced by a timed sample."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.inputs.config import make_input
from distilbeam.pipelines.forecast.rates import Forecast, Line, Rates, measure_rates, measure_scoring, workers_of
from distilbeam.pipelines.jobs.distillation import Job
from distilbeam.pipelines.jobs.freeze import freeze
from distilbeam.pipelines.jobs.labelling import LabellingJob
from distilbeam.pipelines.jobs.labelling_plan import LabelPlan
from distilbeam.pipelines.labelling.saved_answers import saved
from distilbeam.pipelines.labelling.shard_plan import Part, Shard, keyed
from distilbeam.pipelines.pool.row_ranges import to_ranges
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.pipelines.steps import Step, steps_of
from distilbeam.student.checkpoint import save_student
from distilbeam.student.networks.build import build_student
from distilbeam.teacher.softlabels import SoftLabelSpec
from distilbeam.teacher.softlabels.manifest import manifest_files, read_entries


def forecast_labelling(job: LabellingJob, plan: LabelPlan, options: PipelineOptions, sample_rows: int) -> Forecast:
    """Forecast what labelling the rows that have no label will cost.

    Args:
      job: the job; its directory is held by this process where there is a sample.
      plan: what is to be done.
      options: Beam's options; they say how many workers there are.
      sample_rows: rows to ask the teacher about, to measure; their labels are kept. 0 asks nothing and leaves times and bytes
        out.

    Raises:
      ValueError: a sample while there are labels of another teacher or form.
    """
    rates, sampled = Rates(), 0
    if sample_rows and plan.tasks:
        if plan.because:
            raise ValueError(
                f"--sample keeps its answers, but the labels in {job.dataset} differ in {', '.join(plan.because)}; leave it "
                "out, or set them aside with 'label --relabel'"
            )
        plan = job.prepare(plan)
        parts = [part for task in plan.tasks for shard in task.shards for part in shard.parts]
        shard = sample_shard(parts, sample_rows, job.spec) if parts else None
        if shard is not None:
            rates, sampled = measure_rates(job.work(job.dataset, job.dead_letters), shard), shard.rows
            plan = job.plan(retry=False)
    line = label_line(
        "label", plan.rows_wanted, plan.rows_asked - plan.rows_saved, plan.shards, rates, workers_of(options)
    )
    return Forecast((*sample_line(sampled), line), workers_of(options), sampled, job.config.prices)


def forecast_run(job: Job, sample_rows: int) -> Forecast:
    """Forecast what the steps of a run that are left will cost; training and evaluation are not in it.

    Args:
      job: the run; its directory is held by this process where there is a sample.
      sample_rows: rows of the pool to ask the teacher about, to measure; a round that chooses one of them does not ask again.
    """
    rates, sampled = Rates(), 0
    if sample_rows:
        freeze(job.run)
        shard = sample_shard([_not_sampled(job)], sample_rows, job.run.sample_spec)
        rates, sampled = (
            measure_rates(job.sample_work(job.run.sampled, job.directory.dead_letters("sampled")), shard),
            shard.rows,
        )
    todo = [step for step in steps_of(job) if not step.done]
    scoring = any(step.name == "select" for step in todo) and job.config.selection.scored is not None and sampled > 0
    rates = replace(rates, score_s=_score_s(job) if scoring else 0.0)
    lines = tuple(line for step in todo if (line := _line(job, step, rates)) is not None)
    return Forecast((*sample_line(sampled), *lines), workers_of(job.options), sampled, job.config.prices)


def sample_shard(parts: Sequence[Part], rows: int, spec: SoftLabelSpec) -> Shard:
    """Take the first rows of the largest of some parts as a shard."""
    largest = max(parts, key=lambda part: part.rows)
    numbers = largest.numbers()[:rows]
    ranges = to_ranges(numbers)
    whole = None if len(ranges) == 2 else ranges
    return keyed([Part(largest.unit, int(numbers[0]), int(numbers[-1]) + 1, whole)], None, spec)


def _not_sampled(job: Job) -> Part:
    return not_sampled(job.run.inputs.pool.units, job.run.sampled)


def not_sampled(units: Sequence[Unit], sampled: Path) -> Part:
    """Find the rows of the largest unit that no sample had.

    Args:
      units: of the pool.
      sampled: directory of the labels of samples.

    Raises:
      ValueError: samples had all of them.
    """
    unit = max(units, key=lambda unit: unit.rows)
    asked = sum(entry.rows + int(entry.extra["failed"]) for entry in read_entries(manifest_files(sampled)))
    if asked >= unit.rows:
        raise ValueError(
            f"--sample: the teacher was asked about all {unit.rows:,} rows that a sample is taken from; leave it out"
        )
    return Part(unit, asked, unit.rows)


def sample_line(rows: int) -> tuple[Line, ...]:
    """Give the line of rows that were asked about to measure, where there were any."""
    return (Line("sample, asked", rows, rows),) if rows else ()


def _line(job: Job, step: Step, rates: Rates) -> Line | None:
    config, pool, workers = job.config, job.run.inputs.pool.rows, workers_of(job.options)
    budget, shard_rows = config.selection.budget, config.engine.shard_rows
    match step.name:
        case "ask":
            rows = _rows_to_ask(job, step)
        case "label":
            assert step.round is not None
            rows = budget - labelled_rows(job.directory.labels(step.round))
        case "compare" if job.directory.summary(job.run.comparison.labels(0)).exists():
            return None
        case "compare":
            total = budget * config.run.rounds
            rows = math.ceil(total * (1 - total / pool))  # the others were bought by the rounds
        case "select" if config.selection.scored is not None:
            assert step.round is not None
            return Line(step.title, pool - step.round * budget, seconds=pool * rates.score_s / workers)
        case _:
            return None
    return label_line(step.title, rows, rows, math.ceil(rows / shard_rows), rates, workers)


def label_line(what: str, rows: int, calls: int, shards: int, rates: Rates, workers: int) -> Line:
    """Price a step that labels rows."""
    size = rows * rates.label_bytes + shards * rates.shard_bytes
    return Line(what, rows, calls, shards, round(size), (calls * rates.label_s + shards * rates.shard_s) / workers)


def _score_s(job: Job) -> float:
    """Time scoring with a student of the right size; what it has learned does not matter."""
    config, inputs = job.run.student_config(), job.run.inputs
    example = inputs.labelled.table.select(inputs.student_columns).slice(0, 1).combine_chunks().to_batches()[0]
    shape = make_input(config.input)(example).shape[1:]
    with tempfile.TemporaryDirectory(prefix="distilbeam-plan-") as directory:
        student = Path(directory) / "student"
        save_student(student, build_student(config, shape, len(inputs.classes)), config, inputs.classes, shape, {})
        return measure_scoring(lambda gains: job.sample_score(student, gains), inputs.pool.units)


def _rows_to_ask(job: Job, step: Step) -> int:
    sets = ("validation", "test", "labelled")
    name = next(name for name in sets if job.directory.summary(job.directory.asked(name)) == step.commit)
    return job.run.labelled_set(name).plan.rows - labelled_rows(job.directory.asked(name))


def labelled_rows(dataset: Path) -> int:
    """Count the rows of a dataset that are labelled, those of an interrupted phase whose answers are kept with them."""
    kept: int = sum(answered.table.num_rows for answered in saved(str(dataset), None))
    return kept + sum(entry.rows for entry in read_entries(manifest_files(dataset)))
