"""Evaluate one student or export on any labelled Parquet: figures, footprint, each class, the worst confusions."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import log_softmax

from distilbeam.pipelines.judging import BATCH_ROWS, Model, cost, load_model, logits_of
from distilbeam.pipelines.units import find_files
from distilbeam.student.evaluate import evaluate, per_class, worst_classes
from distilbeam.student.labelled import class_indices
from distilbeam.teacher.load import load_teacher


def evaluate_directory(directory: Path, data: Path, label: str, teacher: Path | None = None) -> dict[str, Any]:
    """Evaluate a student or an export.

    Args:
      directory: of the student or the export.
      data: labelled Parquet: a file, a directory of them or a glob pattern.
      label: column with the true class, by its name or its index among the student's classes.
      teacher: TOML file with a `[teacher]` section, to ask about the same rows for the agreement.

    Returns:
      `name`; `data`, as `student.evaluate.evaluate` gives it; `classes`, as `per_class`; `worst`, as `worst_classes`; and
      the footprint.

    Raises:
      ValueError: no model, no such file or column, a label that is none of its classes, or a teacher of other classes.
    """
    model = load_model(directory)
    table, labels = _read(model, data, label)
    answers = None if teacher is None else _asked(teacher, table, len(model.classes))
    logits = logits_of(model, table)
    return {
        "name": directory.name,
        "data": evaluate(logits, labels, answers),
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
            figures["data"] = evaluate(logits_of(model, table), labels)
        return figures

    return judge


def _read(model: Model, data: Path, label: str) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    table = pa.concat_tables(pq.read_table(file, partitioning=None) for file in find_files(data, "--data"))
    return table, class_indices(table, label, model.classes)


def _asked(path: Path, table: pa.Table, num_classes: int) -> npt.NDArray[np.float32]:
    """Ask a teacher about a table; return float32 [rows, C] log-probabilities."""
    config = tomllib.loads(path.read_text()).get("teacher")
    if config is None:
        raise ValueError(f"{path} must have a section [teacher]")
    with closing(load_teacher(config, base=path.parent)) as teacher:
        columns = table.select(list(config["input"].get("columns") or [config["input"]["column"]]))
        logits = np.concatenate([teacher.logits(batch) for batch in columns.to_batches(max_chunksize=BATCH_ROWS)])
    if logits.shape[1] != num_classes:
        raise ValueError(f"the teacher must have the student's {num_classes} classes, got {logits.shape[1]}")
    answers: npt.NDArray[np.float32] = log_softmax(logits, axis=1)
    return answers
