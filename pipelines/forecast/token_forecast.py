"""Forecasts of runs of language models: the steps that are left, in blocks, priced by a timed sample."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from distilbeam.pipelines.forecast.forecast import label_line, labelled_rows, not_sampled, sample_line, sample_shard
from distilbeam.pipelines.forecast.rates import Forecast, Line, Rates, measure_rates, measure_scoring, workers_of
from distilbeam.pipelines.jobs.freeze import freeze
from distilbeam.pipelines.jobs.step import Step
from distilbeam.pipelines.language.job import TokenJob
from distilbeam.pipelines.language.run import POOL
from distilbeam.pipelines.language.steps import token_steps


def forecast_token_run(job: TokenJob, sample_rows: int) -> Forecast:
    """Forecast what the steps of a run that are left will cost; training and evaluation are not in it.

    Args:
      job: the run; its directory is held by this process where there is a sample.
      sample_rows: blocks of the pool to ask the teacher about, to measure; a round that chooses one of them does not ask again.
    """
    rates, sampled = Rates(), 0
    if sample_rows:
        freeze(job.run)
        shard = sample_shard([not_sampled(job.run.inputs.pool.units, job.sampled)], sample_rows, job.run.spec())
        rates, sampled = measure_rates(job.label_work(POOL, job.sampled, "sampled", None), shard), shard.rows
    todo = [step for step in token_steps(job) if not step.done]
    if sampled and job.config.selection.scored is not None and any(step.name == "select" for step in todo):
        rates = replace(rates, score_s=_score_s(job))
    lines = tuple(line for step in todo if (line := _line(job, step, rates)) is not None)
    return Forecast((*sample_line(sampled), *lines), workers_of(job.options), sampled, job.config.prices)


def token_sentences(job: TokenJob) -> Iterator[str]:
    """Say what the run buys in tokens, and what labelling fixes."""
    inputs, rounds, labels = job.run.inputs, job.config.run.rounds, job.config.labels
    blocks = inputs.budget * rounds
    yield (
        f"{rounds:,} round(s) of {inputs.budget:,} blocks buy {blocks * inputs.length:,} of the pool's "
        f"{inputs.pool.rows * inputs.length:,} tokens; their context of {inputs.length:,} tokens is fixed by labelling."
    )
    yield f"A block's labels ({labels.kind}, k = {labels.k}) take at most {job.run.spec().label_bytes:,} bytes."


def _line(job: TokenJob, step: Step, rates: Rates) -> Line | None:
    inputs, workers = job.run.inputs, workers_of(job.options)
    where, shard_rows, rounds = job.directory, job.config.engine.shard_rows, job.config.run.rounds
    match step.name:
        case "ask":
            name = next(name for name in inputs.held_out if where.summary(where.asked(name)) == step.commit)
            rows = inputs.held_out[name].rows - labelled_rows(where.asked(name))
        case "label":
            assert step.round is not None
            rows = inputs.budget - labelled_rows(where.labels(step.round))
        case "select" if job.config.selection.scored is not None and (step.round or job.config.scores_at_first):
            assert step.round is not None
            left = inputs.pool.rows - step.round * inputs.budget
            return Line(step.title, left, seconds=left * rates.score_s / workers)
        case "compare" if step.commit == job.run.comparison.student(1):
            if where.summary(job.run.comparison.labels(0)).exists():
                return None
            total = inputs.budget * rounds
            rows = math.ceil(total * (1 - total / inputs.pool.rows))  # the others were bought by the rounds
        case _:
            return None
    return label_line(step.title, rows, rows, math.ceil(rows / shard_rows), rates, workers)


def _score_s(job: TokenJob) -> float:
    """Time scoring with the student as it begins; what it has learned does not matter."""
    with tempfile.TemporaryDirectory(prefix="distilbeam-plan-") as directory:
        student = Path(directory) / "student"
        job.run.write_first(student)
        return measure_scoring(lambda gains: job.score_work(student, gains), job.run.inputs.pool.units)
