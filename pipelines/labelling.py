"""From rows to labelled rows: ask the teacher, encode, attach the estimates. No files and no Beam.

The phase of a run (`label.Label`) and the PTransform (`transforms.LabelExamples`) are two shells around this.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.special import log_softmax

from distilbeam.pipelines.content_ids import ID_BYTES, content_ids
from distilbeam.pipelines.estimates import Estimates
from distilbeam.pipelines.meter import count, timed
from distilbeam.pipelines.models import cached_student, cached_teacher
from distilbeam.pipelines.questions import question_digests
from distilbeam.pipelines.reuse import known_logits
from distilbeam.teacher.asking import RowError, ask
from distilbeam.teacher.protocol import Teacher
from distilbeam.teacher.softlabels import SoftLabelSpec, encode

ROW = "pool_row"  # int64, row of the frozen pool; only in what a run labels
KEPT = (ROW, "gain", "inclusion_probability")
QUESTION = "teacher_question"  # binary of 16 bytes, digest of what the teacher read


@dataclass(frozen=True)
class Labelled:
    """What became of a table of rows.

    Attributes:
      table: the labelled rows: `example_id`, the columns of `KEPT` that came with them, carried columns, labels, estimates.
      failures: one mapping per row without a label: example_id, pool_row, stage, error, attempts.
      calls: rows sent to the teacher, repetitions included.
      requests: times the teacher was called.
      reused: rows whose answer was known already.
    """

    table: pa.Table
    failures: list[dict[str, Any]]
    calls: int
    requests: int
    reused: int


@dataclass(frozen=True)
class Labelling:
    """How rows are labelled.

    Attributes:
      teacher: the teacher, as `models.teacher_text` describes it.
      spec: how answers are stored; its fingerprint must be the loaded teacher's.
      id_column: column with the user's ids, or None for the hash of the carried columns.
      teacher_batch: most rows in one request to the teacher.
      estimates: `Estimates` as text, or None for labels without them.
      student: checkpoint whose logits the weights need; given together with `estimates`.
      reuse: datasets of the same pool whose answers are copied instead of asked again.
      question: columns whose digest is stored, so that the answer is found again where they are not carried.
    """

    teacher: str
    spec: SoftLabelSpec
    id_column: str | None = None
    teacher_batch: int = 256
    estimates: str | None = None
    student: str | None = None
    reuse: tuple[str, ...] = ()
    question: tuple[str, ...] = ()

    def __call__(self, rows: pa.Table) -> Labelled:
        """Label rows.

        Raises:
          ValueError: the teacher is not the one of the specification.
        """
        teacher = self._checked_teacher()
        known = self._known(rows)
        wanted = _rows_with_nan(known) if known is not None else np.arange(rows.num_rows)
        asked = rows if len(wanted) == rows.num_rows else rows.take(wanted)
        with timed("teacher"):
            answers = ask(teacher, _batch(asked), self.spec.num_classes, batch_size=self.teacher_batch)
        count("teacher_calls", answers.calls)
        count("teacher_requests", answers.requests)
        logits = answers.logits
        if known is not None:
            known[wanted], logits = answers.logits, known
        ids = self._ids(rows)
        failures = [_failure(rows, ids, int(wanted[error.row]), error) for error in answers.errors]
        reused = rows.num_rows - len(wanted)
        if failures:
            good = np.delete(np.arange(rows.num_rows), wanted[~answers.ok])
            rows, ids, logits = rows.take(good), ids.take(good), logits[good]
        with timed("encode"):
            table = self._columns(rows, ids, logits)
        return Labelled(table, failures, answers.calls, answers.requests, reused)

    def _checked_teacher(self) -> Teacher:
        teacher = cached_teacher(self.teacher)
        loaded = teacher.fingerprint()
        if loaded != self.spec.teacher:
            raise ValueError(
                f"the teacher changed: these labels are of {self.spec.teacher}, the worker has loaded {loaded}; "
                "put the former teacher back or start a new run directory"
            )
        return teacher

    def _known(self, rows: pa.Table) -> npt.NDArray[np.float32] | None:
        return known_logits(self.reuse, self.spec, rows[ROW].to_numpy()) if self.reuse else None

    def _columns(self, rows: pa.Table, ids: pa.Array, logits: npt.NDArray[np.float32]) -> pa.Table:
        labels = encode(logits, self.spec, rng=_rng(ids, self.spec) if self.spec.kind == "sampled" else None)
        columns: dict[str, Any] = {"example_id": ids}
        columns |= {name: rows[name] for name in (*KEPT, *self.spec.carried) if name in rows.column_names}
        columns |= dict(zip(labels.schema.names, labels.columns, strict=True))
        if self.estimates is not None and self.student is not None:
            student_logits = cached_student(self.student).logits(_batch(rows))
            said = log_softmax(logits / np.float32(self.spec.temperature), axis=1)
            columns |= Estimates.from_text(self.estimates).columns(said, student_logits)
        columns |= self.question_column(rows)
        fields = {field.name: field for field in (*rows.schema, *labels.schema)}
        schema = pa.schema([fields.get(name, pa.field(name, column.type)) for name, column in columns.items()])
        return pa.table(list(columns.values()), schema=schema)

    def question_column(self, rows: pa.Table) -> dict[str, pa.Array]:
        """Digest what each row asks, where that is stored."""
        if not self.question:
            return {}
        digests = question_digests(rows, self.question)
        kind = pa.binary(ID_BYTES)
        return {QUESTION: pa.Array.from_buffers(kind, len(digests), [None, pa.py_buffer(digests.tobytes())])}

    def _ids(self, rows: pa.Table) -> pa.Array:
        if self.id_column is None:
            return pa.array(content_ids(rows.select(self.spec.carried)), pa.binary(ID_BYTES))
        column = rows[self.id_column]
        ids = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if ids.null_count:
            raise ValueError(
                f"data.id: column {self.id_column} must have a value in every row, {ids.null_count:,} have none"
            )
        return ids if pa.types.is_string(ids.type) or pa.types.is_binary(ids.type) else ids.cast(pa.string())


def _rows_with_nan(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    return np.flatnonzero(np.isnan(values).any(axis=1))


def _batch(rows: pa.Table) -> pa.RecordBatch:
    batches = rows.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=rows.schema)


def _failure(rows: pa.Table, ids: pa.Array, row: int, error: RowError) -> dict[str, Any]:
    pool_row = rows[ROW][row].as_py() if ROW in rows.column_names else None
    return {
        "example_id": ids[row].as_py(),
        ROW: pool_row,
        "stage": error.stage,
        "error": error.error,
        "attempts": error.attempts,
    }


def _rng(ids: pa.Array, spec: SoftLabelSpec) -> np.random.Generator:
    """Seed the draws of sampled labels by the rows' ids, so that repeated work draws the same."""
    digest = hashlib.blake2b(spec.meaning().encode(), digest_size=8)
    for value in ids.to_pylist():
        digest.update(value if isinstance(value, bytes) else value.encode())
    return np.random.default_rng(int.from_bytes(digest.digest(), "little"))
