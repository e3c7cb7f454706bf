"""Asking about a table of rows in portions, between which there is time to look at the clock, at others and at the disk.

A portion is as many whole requests as take about a quarter of a second, so that fast teachers are asked about everything
at once. Requests are cut from the table's first row on, whatever the portions are.

A teacher that is unavailable for some rows only (its server dies of one of them, say) is told from one that is away by
asking again about a row that it has answered: when that is answered, the rows are halved until those it cannot be asked
about are found.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.pipelines.engine.counters import count
from distilbeam.pipelines.labelling.asking_apart import Question, ask_apart
from distilbeam.teacher.predict import Answers, RowError, ask
from distilbeam.teacher.protocol import Teacher, TeacherUnavailable

_PORTION_S = 0.25
_rates: dict[str, float] = {}  # rows per second, by teacher
_witnesses: dict[str, pa.RecordBatch] = {}  # a row that the teacher has answered, by teacher


@dataclass(frozen=True)
class Asked:
    """Who is asked, and how.

    Attributes:
      teacher: the teacher, as `model_cache.teacher_text` describes it.
      num_classes: number of classes that each answer must have.
      batch_size: most rows in one request.
      apart: bool [rows], those that are asked in a process apart; None for none.
    """

    teacher: str
    num_classes: int
    batch_size: int
    apart: npt.NDArray[np.bool_] | None


class Portions:
    """The answers to a table's rows, as far as they are known.

    Args:
      teacher: the teacher.
      rows: the rows.
      known: float32 [rows, classes], answers that are known already, NaN elsewhere; or None.
      refused: rows that are not asked about, with why.
      asked: who is asked, and how.

    Attributes:
      errors: one for each row that failed, in no order.
    """

    def __init__(
        self,
        teacher: Teacher,
        rows: pa.Table,
        known: npt.NDArray[np.float32] | None,
        refused: list[RowError],
        asked: Asked,
    ) -> None:
        self._teacher, self._rows, self._asked = teacher, rows, asked
        self.errors = list(refused)
        wanted: npt.NDArray[np.bool_] = np.ones(rows.num_rows, bool)
        if known is not None:
            wanted = np.asarray(np.isnan(known).any(axis=1))
        self._reused = rows.num_rows - int(wanted.sum())
        wanted[[error.row for error in refused]] = False
        self._logits = known
        self._calls = self._requests = 0
        self._apart = np.flatnonzero(wanted & asked.apart) if asked.apart is not None else np.empty(0, np.int64)
        wanted[self._apart] = False
        self._wanted = np.flatnonzero(wanted)
        self._next = 0
        whole = len(self._wanted) == rows.num_rows
        self._batch = as_batch(rows if whole else rows.take(self._wanted))

    @property
    def done(self) -> int:
        """Rows of the table, from the first on, of which nothing is to be asked any more."""
        if len(self._apart):
            return 0
        return int(self._wanted[self._next]) if self._next < len(self._wanted) else self._rows.num_rows

    @property
    def next_rows(self) -> tuple[int, int]:
        """First row and row after the last of the table that the next portion asks about; equal at the end."""
        if len(self._apart) or self._next == len(self._wanted):
            return 0, 0
        stop = self._next + self._size()
        return int(self._wanted[self._next]), int(self._wanted[min(stop, len(self._wanted)) - 1]) + 1

    @property
    def logits(self) -> npt.NDArray[np.float32]:
        """float32 [rows, classes]; NaN in rows that failed or were not asked about yet."""
        if self._logits is None:
            self._logits = np.full((self._rows.num_rows, self._asked.num_classes), np.nan, np.float32)
        return self._logits

    def ask_next(self) -> bool:
        """Ask about the next portion; tell whether there was one.

        Raises:
          TeacherUnavailable: the teacher cannot be reached, whatever the rows.
          TeacherChanged: the teacher changed in the middle.
        """
        if len(self._apart):
            rows, self._apart = self._apart, np.empty(0, np.int64)
            batch = as_batch(self._rows.take(rows))
            question = Question(self._asked.teacher, batch, self._asked.num_classes, self._asked.batch_size)
            self._keep(rows, ask_apart(question))
            return True
        if self._next == len(self._wanted):
            return False
        start, stop = self._next, min(self._next + self._size(), len(self._wanted))
        begun = time.perf_counter()
        self._ask(start, stop)
        self._next = stop
        _rates[self._asked.teacher] = (stop - start) / max(time.perf_counter() - begun, 1e-9)
        return True

    def take_costs(self) -> tuple[int, int, int]:
        """Return rows sent, requests, and rows whose answer was known, since the last call."""
        costs = self._calls, self._requests, self._reused
        self._calls = self._requests = self._reused = 0
        return costs

    def _size(self) -> int:
        """Return how many rows to ask about: whole requests, and all that is left rather than a small rest."""
        step = self._asked.batch_size * max(1, getattr(self._teacher, "parallel", 1))
        steps = max(1, int(_rates.get(self._asked.teacher, 0.0) * _PORTION_S) // step)
        left = len(self._wanted) - self._next
        return left if steps > 1 and left <= 1.5 * steps * step else steps * step

    def _ask(self, start: int, stop: int) -> None:
        try:
            answers = self._answers(start, stop)
        except TeacherUnavailable as e:
            self._look_for_the_cause(start, stop, 1, e)
        else:
            self._keep(self._wanted[start:stop], answers)
            if self._asked.teacher not in _witnesses and answers.ok.any():
                _witnesses[self._asked.teacher] = _copied(self._batch.slice(start + int(answers.ok.argmax()), 1))

    def _answers(self, start: int, stop: int) -> Answers:
        batch = self._batch.slice(start, stop - start)
        return ask(self._teacher, batch, self._asked.num_classes, batch_size=self._asked.batch_size)

    def _look_for_the_cause(self, start: int, stop: int, asked: int, error: TeacherUnavailable) -> None:
        """Ask about rows in halves that made the teacher unavailable, unless it is away for all rows."""
        witness = _witnesses.get(self._asked.teacher)
        if witness is not None:
            self._calls, self._requests = self._calls + 1, self._requests + 1
            ask(self._teacher, witness, self._asked.num_classes)  # raises where the teacher is away
        if stop - start == 1:
            if witness is None:
                raise error
            message = f"{type(error).__name__}: {error}; other rows are answered"
            self.errors.append(RowError(int(self._wanted[start]), "teacher", message, asked))
            return
        middle = (start + stop) // 2
        failed: list[tuple[int, int, TeacherUnavailable]] = []
        for half in ((start, middle), (middle, stop)):
            try:
                answers = self._answers(*half)
            except TeacherUnavailable as e:
                failed.append((*half, e))
            else:
                self._keep(self._wanted[slice(*half)], answers)
                if answers.ok.any():
                    row = half[0] + int(answers.ok.argmax())
                    _witnesses.setdefault(self._asked.teacher, _copied(self._batch.slice(row, 1)))
        if len(failed) == 2 and self._asked.teacher not in _witnesses:
            raise error
        for first, last, again in failed:
            self._look_for_the_cause(first, last, asked + 1, again)

    def _keep(self, rows: npt.NDArray[np.int64], answers: Answers) -> None:
        self._calls += answers.calls
        self._requests += answers.requests
        count("teacher_calls", answers.calls)
        count("teacher_requests", answers.requests)
        self.errors += [RowError(int(rows[e.row]), e.stage, e.error, e.attempts) for e in answers.errors]
        if self._logits is None and len(rows) == self._rows.num_rows:
            self._logits = answers.logits
        elif len(rows) and rows[-1] - rows[0] == len(rows) - 1:
            self.logits[rows[0] : rows[-1] + 1] = answers.logits
        else:
            self.logits[rows] = answers.logits


def as_batch(rows: pa.Table) -> pa.RecordBatch:
    """Return a table as one batch."""
    batches: list[Any] = rows.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=rows.schema)


def _copied(row: pa.RecordBatch) -> pa.RecordBatch:
    """Copy a row, so that it does not keep the batch that it is of."""
    return row.take(pa.array([0]))
