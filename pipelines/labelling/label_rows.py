"""Labelled rows out of rows: ask the teacher, encode, attach the estimates. No files and no Beam.

The phase of a run (`phase.Label`) and the PTransform (`label_examples.LabelExamples`) are two shells around this.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.special import log_softmax

from distilbeam.pipelines.acquisition.usable_answers import ask_student
from distilbeam.pipelines.engine.counters import timed
from distilbeam.pipelines.engine.model_cache import cached_student, cached_teacher
from distilbeam.pipelines.labelling.label_cache import known_logits
from distilbeam.pipelines.labelling.label_quality import Estimates
from distilbeam.pipelines.labelling.portions import Asked, Portions, as_batch
from distilbeam.pipelines.labelling.questions import question_digests
from distilbeam.pipelines.pool.content_ids import ID_BYTES, content_ids
from distilbeam.teacher.predict import RowError
from distilbeam.teacher.protocol import Teacher
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels, encode
from distilbeam.teacher.softlabels.token_labels import encode_tokens

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
      good: int64, which of the rows have a label.
      bad: which have none, as `failures` lists them.
    """

    table: pa.Table
    failures: list[dict[str, Any]]
    calls: int
    requests: int
    reused: int
    good: npt.NDArray[np.int64]
    bad: list[int]


@dataclass(frozen=True)
class Labelling:
    """How rows are labelled.

    Attributes:
      teacher: the teacher, as `model_cache.teacher_text` describes it.
      spec: how answers are stored; its fingerprint must be the loaded teacher's.
      id_column: column with the user's ids, or None for the hash of the carried columns.
      teacher_batch: most rows in one request to the teacher.
      estimates: `Estimates` as text, or None for labels without them.
      student: checkpoint whose logits the weights need; given together with `estimates`.
      reuse: datasets of the same pool whose answers are copied instead of asked again.
      trust: modules whose code the student may call; see `student.trust`.
      question: columns whose digest is stored, so that the answer is found again where they are not carried.
    """

    teacher: str
    spec: SoftLabelSpec
    id_column: str | None = None
    teacher_batch: int = 256
    estimates: str | None = None
    student: str | None = None
    reuse: tuple[str, ...] = ()
    trust: tuple[str, ...] = ()
    question: tuple[str, ...] = ()

    def __call__(self, rows: pa.Table, *, checked: bool = True) -> Labelled:
        """Label rows; see `asking`.

        Raises:
          ValueError: the teacher is not the one of the specification.
        """
        asking = self.asking(rows, checked=checked)
        with timed("teacher"):
            while asking.ask_next():
                pass
        return self.labelled(rows, asking, slice(0, rows.num_rows))

    def asking(self, rows: pa.Table, apart: npt.NDArray[np.bool_] | None = None, *, checked: bool = True) -> Portions:
        """Begin to ask about rows; `labelled` makes labels of the answers.

        Args:
          rows: the rows.
          apart: bool [rows], those that are asked in a process apart.
          checked: whether to see first that the teacher is the one of the specification, for which a server is asked a
            question of its own; without it the caller calls `checked_teacher` before anything is committed.
        """
        teacher = self.checked_teacher() if checked else cached_teacher(self.teacher)
        asked = Asked(self.teacher, self.spec.answer_width, self.teacher_batch, apart)
        refused = {error.row: error for error in (*self._unread(rows), *self._without_id(rows))}
        return Portions(teacher, rows, self._known(rows), list(refused.values()), asked)

    def labelled(self, rows: pa.Table, asking: Portions, piece: slice) -> Labelled:
        """Make labels of the answers to a piece of the rows that were asked about."""
        rows, logits = rows.slice(piece.start, piece.stop - piece.start), asking.logits[piece]
        errors = [error for error in asking.errors if piece.start <= error.row < piece.stop]
        ids = self._ids(rows)
        bad = [error.row - piece.start for error in errors]
        failures = [_failure(rows, ids, row, error) for row, error in zip(bad, errors, strict=True)]
        good = np.arange(rows.num_rows)
        if failures:
            good = np.delete(good, bad)
            rows, ids, logits = rows.take(good), ids.take(good), logits[good]
        with timed("encode"):
            table = self._columns(rows, ids, logits)
        calls, requests, reused = asking.take_costs()
        return Labelled(table, failures, calls, requests, reused, good, bad)

    def checked_teacher(self) -> Teacher:
        """Return the teacher, once it is known to be the one of the specification still.

        Raises:
          ValueError: it is another one.
          TeacherChanged: it says so itself.
        """
        teacher = cached_teacher(self.teacher)
        loaded = teacher.fingerprint()
        if loaded != self.spec.teacher:
            raise ValueError(
                f"the teacher changed: these labels are of {self.spec.teacher}, the worker has loaded {loaded}; "
                "put the former teacher back or start a new run directory"
            )
        return teacher

    def _unread(self, rows: pa.Table) -> list[RowError]:
        """Refuse rows that the student cannot read: nobody is to pay for what cannot be learnt from."""
        if self.student is None or not rows.num_rows:
            return []
        said = ask_student(cached_student(self.student, self.trust), as_batch(rows))
        return [RowError(int(row), "student", reason, 0) for row, reason in sorted(said.reasons.items())]

    def _without_id(self, rows: pa.Table) -> list[RowError]:
        """Refuse rows without an id: nobody could find their labels."""
        if self.id_column is None or not rows[self.id_column].null_count:
            return []
        message = f"data.id: column {self.id_column} must have a value in every row, this one has none"
        without = np.flatnonzero(rows[self.id_column].is_null().to_numpy(zero_copy_only=False))
        return [RowError(row, "input", message, 0) for row in without.tolist()]

    def _known(self, rows: pa.Table) -> npt.NDArray[np.float32] | None:
        return known_logits(self.reuse, self.spec, rows[ROW].to_numpy()) if self.reuse else None

    def _columns(self, rows: pa.Table, ids: pa.Array, logits: npt.NDArray[np.float32]) -> pa.Table:
        labels = self._encoded(ids, logits)
        columns: dict[str, Any] = {"example_id": ids}
        columns |= {name: rows[name] for name in (*KEPT, *self.spec.carried) if name in rows.column_names}
        columns |= dict(zip(labels.schema.names, labels.columns, strict=True))
        if self.estimates is not None and self.student is not None:
            student_logits = cached_student(self.student, self.trust).logits(as_batch(rows))
            said = log_softmax(logits / np.float32(self.spec.temperature), axis=1)
            columns |= Estimates.from_text(self.estimates).columns(said, student_logits)
        columns |= self.question_column(rows)
        fields = {field.name: field for field in (*rows.schema, *labels.schema)}
        schema = pa.schema([fields.get(name, pa.field(name, column.type)) for name, column in columns.items()])
        return pa.table(list(columns.values()), schema=schema)

    def _encoded(self, ids: pa.Array, answers: npt.NDArray[np.float32]) -> pa.RecordBatch:
        if self.spec.unit == "token":  # the teacher made the labels where the logits were
            return encode_tokens(TokenLabels.unpack(answers, self.spec), self.spec)
        return encode(answers, self.spec, seeds=_seeds(ids, self.spec) if self.spec.kind == "sampled" else None)

    def question_column(self, rows: pa.Table) -> dict[str, pa.Array]:
        """Digest what each row asks, where that is stored; whoever read the rows may have done so."""
        if not self.question:
            return {}
        if QUESTION in rows.column_names:
            return {QUESTION: rows[QUESTION]}
        digests = question_digests(rows, self.question)
        kind = pa.binary(ID_BYTES)
        return {QUESTION: pa.Array.from_buffers(kind, len(digests), [None, pa.py_buffer(digests.tobytes())])}

    def _ids(self, rows: pa.Table) -> pa.Array:
        if self.id_column is None:
            return pa.array(content_ids(rows.select(self.spec.carried)), pa.binary(ID_BYTES))
        column = rows[self.id_column]
        ids = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        return ids if pa.types.is_string(ids.type) or pa.types.is_binary(ids.type) else ids.cast(pa.string())


def _failure(rows: pa.Table, ids: pa.Array, row: int, error: RowError) -> dict[str, Any]:
    pool_row = rows[ROW][row].as_py() if ROW in rows.column_names else None
    return {
        "example_id": ids[row].as_py(),
        ROW: pool_row,
        "stage": error.stage,
        "error": plain(error.error),
        "attempts": error.attempts,
    }


def plain(text: str) -> str:
    """Return text that every file takes: half a surrogate pair is written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def _seeds(ids: pa.Array, spec: SoftLabelSpec) -> npt.NDArray[np.uint64]:
    """Seed each row's draws of a sampled label by its id and what the label means, whatever rows are beside it."""
    meaning = hashlib.blake2b(spec.meaning().encode(), digest_size=32).digest()
    values = ids.cast(pa.binary()).to_pylist()
    hashes = (hashlib.blake2b(value, digest_size=8, key=meaning).digest() for value in values)
    return np.frombuffer(b"".join(hashes), "<u8").astype(np.uint64, copy=False)
