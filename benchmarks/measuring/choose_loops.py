"""Ways of scoring a pool with a student, choosing 5 % of it by the game, and labelling these: a loop, and distilbeam's phases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distilbeam.pipelines.acquisition.score import Score
from distilbeam.pipelines.acquisition.select import Choice, choose
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.engine.model_cache import cached_student, cached_teacher, teacher_text
from distilbeam.pipelines.engine.phase import run_phase
from distilbeam.pipelines.labelling.label_rows import Labelling
from distilbeam.pipelines.labelling.phase import Label
from distilbeam.pipelines.labelling.shard_plan import plan_shards
from distilbeam.pipelines.pool.pool_files import find_files
from distilbeam.pipelines.pool.splits import plan_units
from distilbeam.selection.gains import margin_gain
from distilbeam.selection.games.rad import rad_marginals
from distilbeam.selection.rounding import dep_round
from distilbeam.student.checkpoint import save_student
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.teacher.softlabels import SoftLabelSpec, encode
from distilbeam.teacher.softlabels.columns import parquet_options
from measuring.label_loops import BATCH, Task, _ask, _inputs

SHARE, WRONG = 0.05, 0.1


def student_of(task: Task) -> Path:
    """Write the linear student that scores, once."""
    directory = task.output.parent / "student"
    if not directory.exists():
        torch.manual_seed(1)
        reads = {"columns": task.columns, "shape": [task.features]}
        config = StudentConfig.model_validate({"kind": "linear", "input": reads})
        module = build_student(config, (task.features,), task.classes)
        save_student(directory, module, config, [str(i) for i in range(task.classes)], (task.features,), {})
    return directory


def plain_choice(task: Task) -> None:
    """Two passes over the pool and the game in memory, with nothing around."""
    task.output.mkdir(parents=True, exist_ok=True)
    student = cached_student(str(student_of(task))).module
    files = sorted(task.pool.glob("*.parquet"))
    gains = [
        margin_gain(_ask(student, _inputs(batch, task))).astype(np.float32)
        for file in files
        for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=list(task.columns))
    ]
    pool = np.concatenate(gains)
    budget = round(SHARE * len(pool))
    solution = rad_marginals(pool, WRONG * len(pool), budget)
    chosen = dep_round(solution.probabilities, np.random.default_rng(0))
    _label_chosen(task, files, chosen)


def distilbeam_choice(task: Task) -> None:
    """The phases of a run: score, solve, pick, label."""
    pool = plan_units(find_files(task.pool), 262_144)
    output, student = task.output, str(student_of(task))
    config = task.config()
    teacher = teacher_text(config.teacher.relative_to(task.output.parent))
    fingerprint = cached_teacher(teacher).fingerprint()
    budget = round(SHARE * pool.rows)
    choice = Choice(pool, output / "selected", "rad", budget, WRONG, (), 0, 0, {"teacher": fingerprint})
    score = Score(student, "margin", str(choice.gains), (), task.columns, config.engine.batch_rows)
    options = pipeline_options()
    run_phase("score", score, pool.units, errors=output / "errors", options=options)
    choose(choice)
    spec = SoftLabelSpec(num_classes=task.classes, teacher=fingerprint)
    labelling = Labelling(teacher, spec, id_column="id", teacher_batch=task.teacher_batch)
    columns = ("id", *task.columns)
    picks, dead = str(choice.picks), str(output / "dead")
    work = Label(labelling, str(output / "labels"), dead, columns, picks, config.engine.batch_rows)
    tasks = plan_shards(pool.units, picks, config.engine.shard_rows, spec)
    run_phase("label", work, tasks, errors=output / "errors", options=options)


def _label_chosen(task: Task, files: list[Path], chosen: np.ndarray) -> None:
    model, spec, first = task.model(), SoftLabelSpec(num_classes=task.classes), 0
    for file in files:
        tables = []
        for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=["id", *task.columns]):
            here = np.flatnonzero(chosen[first : first + len(batch)])
            first += len(batch)
            if len(here):
                rows = batch.take(pa.array(here))
                labels = encode(_ask(model, _inputs(rows, task)), spec)
                tables.append(pa.table([rows["id"], *labels.columns], names=["example_id", *labels.schema.names]))
        if tables:
            table = pa.concat_tables(tables)
            pq.write_table(table, task.output / f"{file.stem}.parquet", **parquet_options(table.schema))
