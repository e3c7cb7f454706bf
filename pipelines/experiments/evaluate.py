"""Evaluate one student or export on any labelled Parquet: figures, footprint, each class, the worst confusions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import log_softmax

from distilbeam.pipelines.experiments.model_metrics import (
    BATCH_ROWS,
    Model,
    cost,
    integers_of,
    logits_of,
)
from distilbeam.pipelines.labelling.teacher_answers import read_answers
from distilbeam.pipelines.pool.datasets import require_columns
from distilbeam.pipelines.pool.pool_files import find_files, open_parquet
from distilbeam.student.data.labelled import class_indices, inputs_of
from distilbeam.student.evaluation.metrics import evaluate, per_class, worst_classes
from distilbeam.student.export.load import input_of, load_model
from distilbeam.teacher.config import read_teacher_config
from distilbeam.teacher.load import load_teacher
from distilbeam.teacher.softlabels import read_manifest


def evaluate_directory(
    directory: Path, data: Path, label: str, teacher: Path | None = None, answers: Path | None = None
) -> dict[str, Any]:
    """Evaluate a student or an export.

    Args:
      directory: of the student or the export.
      data: labelled Parquet: a file, a directory of them or a glob pattern.
      label: column with the true class; whole numbers mean what they meant in the student's training.
      teacher: TOML file with a `[teacher]` section, to ask about the same rows for the agreement.
      answers: soft-label dataset of the same rows instead, such as a run's `teacher/test`.

    Returns:
      `name`; `data`, as `student.evaluate.evaluate` gives it; `classes`, as `per_class`; `worst`, as `worst_classes`; and
      the footprint.

    Raises:
      ValueError: no model, no such file or column, a label that is none of its classes, a row that it cannot read, or a
        teacher or answers of other classes or rows.
    """
    if teacher is not None and answers is not None:
        raise ValueError("--teacher and --answers must not both be given: ask the teacher, or read what it answered")
    model = load_model(directory)
    table, labels = _read(model, data, label, () if teacher is None else _teacher_columns(teacher))
    said = None
    if teacher is not None:
        said = _asked(teacher, table, model.classes)
    elif answers is not None:
        said = _stored(answers, table.num_rows)
    if said is not None and said.shape[1] != len(model.classes):
        raise ValueError(f"the teacher must have the student's {len(model.classes)} classes, got {said.shape[1]}")
    logits = logits_of(model, table)
    return {
        "name": directory.name,
        "data": evaluate(logits, labels, said),
        "classes": per_class(logits, labels, model.classes),
        "worst": worst_classes(logits, labels, model.classes),
        **cost(directory, model),
    }


def judge_of(data: Path | None, label: str) -> Callable[[Path], dict[str, Any]]:
    """Make the function that judges a student's or an export's directory, on labelled Parquet if there is any."""

    def judge(directory: Path) -> dict[str, Any]:
        model = load_model(directory)
        figures: dict[str, Any] = dict(cost(directory, model))
        if data is not None:
            table, labels = _read(model, data, label)
            logits = logits_of(model, table)
            figures |= {
                "data": evaluate(logits, labels),
                "classes": per_class(logits, labels, model.classes),
                "classes_on": "data",
            }
        return figures

    return judge


def _read(model: Model, data: Path, label: str, more: Sequence[str] = ()) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """Read labelled rows; one that the model cannot read is named with its file."""
    files, columns = find_files(data, "--data"), input_of(model).columns
    wanted = list(dict.fromkeys([*columns, *more, label]))
    tables = []
    for file in files:
        found = open_parquet(file, "--data").schema_arrow.names
        if label not in found:
            raise ValueError(
                f"label column {label!r} must be one of {', '.join(found)}, the columns of {file}; --label COLUMN names it"
            )
        require_columns(found, wanted, f"--data: {file}")
        tables.append(pq.read_table(file, columns=wanted, partitioning=None))
        if tables[-1].num_rows:
            inputs_of(tables[-1], input_of(model), partial(_row_name, file))
    table = pa.concat_tables(tables)
    return table, class_indices(table, label, model.classes, integers_of(model))


def _row_name(file: Path, row: int) -> str:
    return f"--data: row {row:,} of {file}"


def _teacher_columns(path: Path) -> list[str]:
    return list(read_teacher_config(path).input.columns)


def _asked(path: Path, table: pa.Table, classes: Sequence[str]) -> npt.NDArray[np.float32]:
    """Ask a teacher about a table; return float32 [rows, C] log-probabilities."""
    with closing(load_teacher(read_teacher_config(path), classes=classes)) as teacher:
        columns = table.select(_teacher_columns(path))
        logits = np.concatenate([teacher.logits(batch) for batch in columns.to_batches(max_chunksize=BATCH_ROWS)])
    answers: npt.NDArray[np.float32] = log_softmax(logits, axis=1)
    return answers


def _stored(dataset: Path, rows: int) -> npt.NDArray[np.float32]:
    """Read the stored answers for a file's rows; return float32 [rows, C] log-probabilities, NaN where there is none."""
    manifest = read_manifest(dataset)
    if manifest.spec.kind != "dense" or manifest.rows > rows:
        raise ValueError(
            f"--answers must be dense soft labels of the {rows:,} rows of --data, {dataset} has {manifest.rows:,} of kind "
            f"{manifest.spec.kind}"
        )
    return read_answers(dataset, manifest.spec, rows)
