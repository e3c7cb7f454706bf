"""Asking a teacher so that a row that fails costs its neighbours nothing.

A batch that raises, or that comes back with fewer rows or another number of classes, is halved and asked again, down to
single rows: one bad row of n costs about 2 log2 n further requests. NaN and infinite logits name their rows themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.teacher.preprocess import InputError
from distilbeam.teacher.protocol import Teacher, TeacherChanged, TeacherUnavailable

_MESSAGE_CHARACTERS = 500


@dataclass(frozen=True)
class RowError:
    """Why a row has no label.

    Attributes:
      row: its index in the batch.
      stage: `input` (its columns are not what the teacher reads), `teacher` (the teacher raised) or `answer` (what came
        back is no label).
      error: type and message.
      attempts: requests that the row was part of.
    """

    row: int
    stage: str
    error: str
    attempts: int


@dataclass(frozen=True)
class Answers:
    """What a teacher answered to n rows.

    Attributes:
      logits: float32 [n, C]; NaN in the rows that failed.
      ok: bool [n].
      errors: one for each row that failed, in order of rows.
      calls: rows sent, repetitions included.
      requests: times the teacher was called.
    """

    logits: npt.NDArray[np.float32]
    ok: npt.NDArray[np.bool_]
    errors: Sequence[RowError]
    calls: int
    requests: int


def ask(
    teacher: Teacher, batch: pa.RecordBatch, num_classes: int, *, batch_size: int = 256, attempts: int = 1
) -> Answers:
    """Ask a teacher about every row of a batch.

    Args:
      teacher: the teacher. One that keeps several requests in flight says how many in its attribute `parallel` and gets
        as many batches in one call. One that has `prepared` may make the input of all rows at once (see `LocalTeacher`).
      batch: n rows.
      num_classes: number of classes C that each answer must have.
      batch_size: most rows in one request.
      attempts: times that a row is asked alone before it is given up; errors that can pass are repeated by the teacher.

    Returns:
      The answers.

    Raises:
      TeacherChanged: the teacher changed in the middle.
      TeacherUnavailable: the teacher cannot be reached.
      ValueError: batch_size or attempts is less than 1.
    """
    for name, value in (("batch_size", batch_size), ("attempts", attempts)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    state = _State(teacher, batch, num_classes, attempts)
    step = batch_size * max(1, getattr(teacher, "parallel", 1))
    for start in range(0, len(batch), step):
        state.ask(start, min(start + step, len(batch)), 0)
    state.check()
    errors = sorted(state.errors, key=lambda error: error.row)
    ok = np.ones(len(batch), bool)
    ok[[error.row for error in errors]] = False
    return Answers(state.logits, ok, errors, state.calls, state.requests)


class _Refused(Exception):  # noqa: N818  (not an error of ours: what the teacher said is no answer)
    pass


@dataclass
class _State:
    teacher: Any
    batch: pa.RecordBatch
    num_classes: int
    attempts: int
    errors: list[RowError] = field(default_factory=list)
    calls: int = 0
    requests: int = 0
    logits: npt.NDArray[np.float32] = field(init=False)
    inputs: npt.NDArray[Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.logits = np.empty((len(self.batch), self.num_classes), np.float32)
        if hasattr(self.teacher, "prepared"):
            with suppress(Exception):  # whatever is wrong comes again with each request, which finds the rows it is of
                self.inputs = self.teacher.prepared(self.batch)

    def ask(self, start: int, stop: int, asked: int, alone: int = 0) -> None:
        """Ask rows start to stop, which were part of `asked` requests before, `alone` of them for one row alone."""
        try:
            answer = self._answer(start, stop)
        except (TeacherChanged, TeacherUnavailable):
            raise
        except Exception as e:  # noqa: BLE001  (a model may raise anything; the row keeps it)
            self._failed(start, stop, asked + 1, alone + 1, e)
        else:
            self._take(start, answer, asked + 1)

    def _answer(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        self.calls += stop - start
        self.requests += 1
        if self.inputs is None:
            answer = np.asarray(self.teacher.logits(self.batch.slice(start, stop - start)))
        else:
            answer = np.asarray(self.teacher.answer(self.inputs[start:stop]))
        expected = (stop - start, self.num_classes)
        if answer.shape != expected:
            raise _Refused(f"the teacher must answer with shape {list(expected)}, got {list(answer.shape)}")
        return answer.astype(np.float32, copy=False)

    def _failed(self, start: int, stop: int, asked: int, alone: int, error: Exception) -> None:
        if stop - start > 1:
            middle = (start + stop) // 2
            self.ask(start, middle, asked)
            self.ask(middle, stop, asked)
        elif alone < self.attempts:
            self.ask(start, stop, asked, alone)
        else:
            self._give_up(start, _stage(error), _message(error), asked)

    def _take(self, start: int, answer: npt.NDArray[np.float32], asked: int) -> None:
        self.logits[start : start + len(answer)] = answer
        if asked > 1:
            self._refuse_infinite(start, start + len(answer), asked)

    def check(self) -> None:
        """Look at the answers of the requests that went well at once: many small requests would pay for it one by one."""
        self._refuse_infinite(0, len(self.logits), 1)

    def _refuse_infinite(self, start: int, stop: int, asked: int) -> None:
        logits = self.logits[start:stop]
        if np.isfinite(logits).all():
            return
        known = {error.row for error in self.errors}
        for row in (start + np.flatnonzero(~np.isfinite(logits).all(axis=1))).tolist():
            if row in known:
                continue
            count, total = int((~np.isfinite(self.logits[row])).sum()), self.num_classes
            message = f"the teacher's logits must be finite, {count:,} of {total:,} are NaN or infinite"
            self._give_up(row, "answer", message, asked)

    def _give_up(self, row: int, stage: str, message: str, asked: int) -> None:
        self.logits[row] = np.nan
        self.errors.append(RowError(row, stage, message[:_MESSAGE_CHARACTERS], asked))


def _stage(error: Exception) -> str:
    if isinstance(error, InputError):
        return "input"
    return "answer" if isinstance(error, _Refused) else "teacher"


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, (InputError, _Refused)) else f"{type(error).__name__}: {error}"
