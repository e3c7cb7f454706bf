"""Asking a teacher: requests are cut and repeated so that a row that fails costs its neighbours nothing.

A request that raises, or that comes back with fewer rows or another number of classes, is asked again in sixteenths, and
those that fail in sixteenths of theirs, down to single rows: of n <= 256 rows a bad one costs n + 16 more, where halves
would cost 2n. Before that its first row is asked alone, and if that fails its last: when both do, the error is likely
one of every row, and the others are asked alone too, so that no error makes a request cost more than twice its rows.
What is no number names its rows itself. A teacher that never answered with the right number of classes stops the job.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.config import InputError
from distilbeam.teacher.answers import AnswerError, labels
from distilbeam.teacher.protocol import Teacher, TeacherChanged, TeacherMisfit, TeacherUnavailable

_MESSAGE_CHARACTERS = 500
_PARTS = 16
_NOT_OF_THE_ROWS = (TeacherChanged, TeacherMisfit, TeacherUnavailable)

# Teachers that answered with the right shape at least once: of these, another one is the fault of a row.
_fitting: WeakValueDictionary[int, Any] = WeakValueDictionary()


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
      logits: float32 [n, C], -inf for a class of probability 0; NaN in the rows that failed.
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
        as many batches in one call; its method `in_pieces`, where it has one, says which of them failed (see
        `TfServingTeacher`). One that has `prepared` may make the input of all rows at once (see `LocalTeacher`).
      batch: n rows.
      num_classes: number of classes C that each answer must have.
      batch_size: most rows in one request.
      attempts: times that a row is asked alone before it is given up; errors that can pass are repeated by the teacher.

    Returns:
      The answers.

    Raises:
      TeacherChanged: the teacher changed in the middle.
      TeacherMisfit: its answers have another number of classes, or are numbers of another kind.
      TeacherUnavailable: the teacher cannot be reached.
      ValueError: batch_size or attempts is less than 1.
    """
    for name, value in (("batch_size", batch_size), ("attempts", attempts)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    state = _State(teacher, batch, num_classes, attempts)
    together = batch_size * max(1, getattr(teacher, "parallel", 1))
    for start in range(0, len(batch), together):
        state.ask(start, min(start + together, len(batch)), batch_size)
    state.refuse_what_is_no_label()
    errors = sorted(state.errors, key=lambda error: error.row)
    ok = np.ones(len(batch), bool)
    ok[[error.row for error in errors]] = False
    return Answers(state.logits, ok, errors, state.calls, state.requests)


class _Refused(Exception):  # noqa: N818  (not an error of ours: what the teacher said is no answer)
    pass


class _Misshapen(_Refused):
    """Another number of classes."""


Piece = tuple[int, int, npt.NDArray[np.float32] | Exception]


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
    times: npt.NDArray[np.int32] = field(init=False)
    inputs: npt.NDArray[Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.logits = np.empty((len(self.batch), self.num_classes), np.float32)
        self.times = np.zeros(len(self.batch), np.int32)
        if hasattr(self.teacher, "prepared"):
            with suppress(Exception):  # whatever is wrong comes again with each request, which finds the rows it is of
                self.inputs = self.teacher.prepared(self.batch)

    def ask(self, start: int, stop: int, rows: int) -> None:
        """Ask rows start to stop, at most `rows` in a request, and go after the requests that fail."""
        if hasattr(self.teacher, "in_pieces"):
            self._isolate(self._pieces(start, stop, rows))
        elif stop - start <= rows or getattr(self.teacher, "parallel", 1) == 1:
            self._isolate(self._one(i, min(i + rows, stop)) for i in range(start, stop, rows))
        else:  # several batches in one call, which says of all of them that it failed
            whole = self._one(start, stop)
            if isinstance(whole[2], Exception):
                self._isolate(self._one(i, min(i + rows, stop)) for i in range(start, stop, rows))
            else:
                self._isolate([whole])

    def _isolate(self, pieces: Iterable[Piece]) -> None:
        for start, stop, answer in pieces:
            if not isinstance(answer, Exception):
                self.logits[start:stop] = answer
                _fitting[id(self.teacher)] = self.teacher
            elif stop - start == 1:
                self._require_fitting([answer], answer)
                self._alone(start, answer)
            else:
                self._part(start, stop, answer)

    def _part(self, start: int, stop: int, error: Exception) -> None:
        """Find the rows for which a request failed."""
        probed = [self._probe(start)]
        first, last = start + 1, stop
        if probed[0] is not None:
            probed.append(self._probe(stop - 1))
            last = stop - 1
        failed = [found for found in probed if found is not None]
        self._require_fitting(failed if len(failed) == 2 else [], error)
        for row, found in zip((start, stop - 1), probed, strict=False):
            if found is not None:
                self._alone(row, found)
        if first < last:
            self.ask(first, last, 1 if len(failed) == 2 else -(-(last - first) // _PARTS))

    def _probe(self, row: int) -> Exception | None:
        """Ask one row alone; keep its answer, or return its error."""
        ((_, _, answer),) = (
            self._pieces(row, row + 1, 1) if hasattr(self.teacher, "in_pieces") else [self._one(row, row + 1)]
        )
        if isinstance(answer, Exception):
            return answer
        self._isolate([(row, row + 1, answer)])
        return None

    def _alone(self, row: int, error: Exception) -> None:
        """Ask a row that failed alone again, as often as it may be, and give it up."""
        for _ in range(1, self.attempts):
            found = self._probe(row)
            if found is None:
                return
            error = found
        self._give_up(row, _stage(error), _message(error))

    def _require_fitting(self, failed: Sequence[Exception], error: Exception) -> None:
        """Stop where rows came back with another number of classes and none ever with the right one."""
        misshapen = bool(failed) and all(isinstance(found, _Misshapen) for found in (*failed, error))
        if misshapen and _fitting.get(id(self.teacher)) is not self.teacher:
            raise TeacherMisfit(
                f"{error}: one row for each example, one number for each class of data.classes or data.num_classes; correct "
                "these, or choose another output of the model (teacher.output)"
            )

    def _pieces(self, start: int, stop: int, rows: int) -> Iterator[Piece]:
        """Ask in requests that are in flight together, of which each succeeds or fails by itself."""
        for count, answer in self.teacher.in_pieces(self.batch.slice(start, stop - start), rows):
            self._count(start, start + count)
            yield start, start + count, self._checked(answer, count)
            start += count

    def _one(self, start: int, stop: int) -> Piece:
        self._count(start, stop)
        try:
            if self.inputs is None:
                answer = self.teacher.logits(self.batch.slice(start, stop - start))
            else:
                answer = self.teacher.answer(self.inputs[start:stop])
        except _NOT_OF_THE_ROWS:
            raise
        except Exception as e:  # noqa: BLE001  (a model may raise anything; the row keeps it)
            return start, stop, e
        return start, stop, self._checked(answer, stop - start)

    def _count(self, start: int, stop: int) -> None:
        self.calls += stop - start
        self.requests += 1
        self.times[start:stop] += 1

    def _checked(self, answer: Any, rows: int) -> npt.NDArray[np.float32] | Exception:
        if isinstance(answer, Exception):
            return answer
        try:
            array = np.asarray(answer)
            expected = (rows, self.num_classes)
            if array.shape != expected:
                kind = _Refused if array.ndim == 2 and array.shape[1] == self.num_classes else _Misshapen
                return kind(f"the teacher must answer with shape {list(expected)}, got {list(array.shape)}")
            return array.astype(np.float32, copy=False)
        except Exception as e:  # noqa: BLE001  (what is no array of numbers)
            return e

    def refuse_what_is_no_label(self) -> None:
        """Look at all answers together: many small requests would pay for it one by one."""
        if np.isfinite(self.logits).all():
            return
        known = {error.row for error in self.errors}
        for row in np.flatnonzero(~labels(self.logits)).tolist():
            if row in known:
                continue
            count, total = int((~np.isfinite(self.logits[row])).sum()), self.num_classes
            message = f"the teacher's logits must be finite, {count:,} of {total:,} are NaN or infinite"
            if (self.logits[row] == -np.inf).all():
                message = f"the teacher's logits must hold a finite one, all {total:,} are -inf: no class is possible"
            self._give_up(row, "answer", message)

    def _give_up(self, row: int, stage: str, message: str) -> None:
        self.logits[row] = np.nan
        self.errors.append(RowError(row, stage, message[:_MESSAGE_CHARACTERS], int(self.times[row])))


def _stage(error: Exception) -> str:
    if isinstance(error, InputError):
        return "input"
    return "answer" if isinstance(error, (_Refused, AnswerError)) else "teacher"


def _message(error: Exception) -> str:
    plain = isinstance(error, (InputError, _Refused, AnswerError))
    return str(error) if plain else f"{type(error).__name__}: {error}"
