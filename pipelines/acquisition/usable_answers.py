"""A student's answers, row by row where it must be: a row that it cannot read costs its neighbours nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.student.checkpoint import Student
from distilbeam.student.data.usable_rows import find_usable


@dataclass(frozen=True)
class UsableAnswers:
    """A student's answers to a batch.

    Attributes:
      rows: int64 [usable], the rows of the batch that it can read and answers with finite numbers, ascending.
      logits: float32 [usable, C].
      embeddings: float32 [usable, d], what its last layer sees; None where they were not asked for.
      reasons: why each of the other rows is not usable, by its row.
    """

    rows: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32]
    embeddings: npt.NDArray[np.float32] | None
    reasons: dict[int, str]


def ask_student(student: Student, batch: pa.RecordBatch, embeddings: bool = False) -> UsableAnswers:
    """Ask a student about the rows of a batch that it can read.

    Args:
      student: who is asked, loaded in this process.
      batch: with the columns that it reads.
      embeddings: whether to return what its last layer sees too.
    """
    found = find_usable(student.inputs, batch, student.input_shape)
    rows, reasons = found.rows, found.reasons
    if found.inputs is None or not len(rows):
        none = np.empty((0, 1), np.float32)
        return UsableAnswers(
            rows, np.empty((0, len(student.classes)), np.float32), none if embeddings else None, reasons
        )
    logits, seen = (
        student.embeddings_of_inputs(found.inputs) if embeddings else (student.logits_of_inputs(found.inputs), None)
    )
    finite = np.isfinite(logits).all(axis=1) & (True if seen is None else np.isfinite(seen).all(axis=1))
    if not finite.all():
        reasons = reasons | dict.fromkeys(rows[~finite].tolist(), "the student's answer to it is not finite")
        rows, logits, seen = rows[finite], logits[finite], None if seen is None else seen[finite]
    return UsableAnswers(rows, logits, seen, reasons)
