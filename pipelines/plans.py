"""Forecasts of labelling jobs and of runs: the steps that are left, priced by a timed sample."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path

from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines.forecast import Forecast, Line, Rates, measure_rates, measure_scoring, workers_of
from distilbeam.pipelines.job import Job
from distilbeam.pipelines.labelling_job import LabellingJob, LabelPlan
from distilbeam.pipelines.steps import Step, steps_of
from distilbeam.student.checkpoint import save_student
from distilbeam.student.models import build_student
from distilbeam.teacher.preprocess import make_input
from distilbeam.teacher.softlabels.manifest import manifest_files, read_entries


def forecast_labelling(job: LabellingJob, plan: LabelPlan, options: PipelineOptions, sample_rows: int) -> Forecast:
    """Forecast what labelling the rows that have no label will cost.

    Args:
      job: the job.
      plan: what is to be done.
      options: Beam's options; they say how many workers there are.
      sample_rows: rows to ask the teacher about, to measure; 0 asks nothing and leaves times and bytes out.
    """
    units = list(dict.fromkeys(part.unit for part in plan.standing.wanted))
    rates, sampled = measure_rates(job.work, units, sample_rows)
    line = _label_line("label", plan.standing.rows_wanted, plan.shards, rates, workers_of(options))
    return Forecast((line,), workers_of(options), sampled, job.config.prices)


def forecast_run(job: Job, sample_rows: int) -> Forecast:
    """Forecast what the steps of a run that are left will cost; training and evaluation are not in it."""
    rates, sampled = measure_rates(job.sample_work, job.inputs.pool.units, sample_rows)
    todo = [step for step in steps_of(job) if not step.done]
    scoring = any(step.name == "select" for step in todo) and job.config.selection.method != "uniform" and sampled > 0
    rates = replace(rates, score_s=_score_s(job) if scoring else 0.0)
    lines = tuple(line for step in todo if (line := _line(job, step, rates)) is not None)
    return Forecast(lines, workers_of(job.options), sampled, job.config.prices)


def _line(job: Job, step: Step, rates: Rates) -> Line | None:
    config, pool, workers = job.config, job.inputs.pool.rows, workers_of(job.options)
    budget, shard_rows = config.selection.budget, config.engine.shard_rows
    match step.name:
        case "ask":
            rows = _rows_to_ask(job, step)
        case "label":
            assert step.round is not None
            rows = budget - _labelled(job.directory.labels(step.round))
        case "compare" if job.directory.summary(job.comparison.labels(0)).exists():
            return None
        case "compare":
            total = budget * config.run.rounds
            rows = math.ceil(total * (1 - total / pool))  # the others were bought by the rounds
        case "select" if config.selection.method != "uniform":
            assert step.round is not None
            return Line(step.title, pool - step.round * budget, seconds=pool * rates.score_s / workers)
        case _:
            return None
    return _label_line(step.title, rows, math.ceil(rows / shard_rows), rates, workers)


def _label_line(what: str, rows: int, shards: int, rates: Rates, workers: int) -> Line:
    size = rows * rates.label_bytes + shards * rates.shard_bytes
    return Line(what, rows, rows, shards, round(size), (rows * rates.label_s + shards * rates.shard_s) / workers)


def _score_s(job: Job) -> float:
    """Time scoring with a student of the right size; what it has learned does not matter."""
    config, inputs = job.config.student, job.inputs
    config = config.model_copy(update={"input": config.input.relative_to(job.base)})
    example = inputs.labelled.table.select(inputs.student_columns).slice(0, 1).combine_chunks().to_batches()[0]
    shape = make_input(config.input)(example).shape[1:]
    with tempfile.TemporaryDirectory(prefix="distilbeam-plan-") as directory:
        student = Path(directory) / "student"
        save_student(student, build_student(config, shape, len(inputs.classes)), config, inputs.classes, shape, {})
        return measure_scoring(lambda gains: job.sample_score(student, gains), inputs.pool.units)


def _rows_to_ask(job: Job, step: Step) -> int:
    sets = ("validation", "test", "labelled")
    name = next(name for name in sets if job.directory.summary(job.directory.asked(name)) == step.commit)
    return job.labelled_set(name).plan.rows - _labelled(job.directory.asked(name))


def _labelled(dataset: Path) -> int:
    return sum(entry.rows for entry in read_entries(manifest_files(dataset)))
