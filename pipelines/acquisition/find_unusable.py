"""The phase before a uniform choice: rows of the pool that the student cannot read, found without scoring the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.acquisition.score import UnitFiles
from distilbeam.pipelines.acquisition.unusable_rows import unusable_directory, unusable_table
from distilbeam.pipelines.engine.counters import count, count_seconds
from distilbeam.pipelines.engine.model_cache import cached_student
from distilbeam.pipelines.engine.prefetch import read_from
from distilbeam.pipelines.pool.read_splits import read_unit
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.storage.atomic import temporary_name
from distilbeam.student.data.usable_rows import find_usable


@dataclass(frozen=True)
class FindUnusable(UnitFiles):
    """The work of the phase: a list for each unit, empty where the student can read all rows.

    Attributes:
      student: directory of the student's checkpoint.
      gains: where a score phase would write its gains; the lists lie beside it, see `unusable_rows`.
      columns: pool columns that the student reads.
      batch_rows: rows read at a time.
      trust: modules whose code the student may call; see `student.trust`.
    """

    student: str
    gains: str
    columns: tuple[str, ...]
    batch_rows: int
    trust: tuple[str, ...] = ()

    def __call__(self, unit: Unit) -> Iterator[tuple[Path, Path]]:
        """Begin to read the unit, where that pays; what is returned looks and yields the list's temporary and final file."""
        return self._look(unit, read_from(unit.path, read_unit(unit, self.columns, self.batch_rows)))

    def _look(self, unit: Unit, read: Iterator[tuple[pa.RecordBatch, float]]) -> Iterator[tuple[Path, Path]]:
        student = cached_student(self.student, self.trust)
        reasons: dict[int, str] = {}
        first = 0
        for batch, seconds in read:
            count_seconds("read", seconds)
            found = find_usable(student.inputs, batch, student.input_shape).reasons
            reasons |= {first + row: reason for row, reason in found.items()}
            first += batch.num_rows
        count("rows_unusable", len(reasons))
        file = self._file(unit)
        temporary = temporary_name(file)
        pq.write_table(unusable_table(unit, reasons), temporary)
        yield temporary, file

    def _file(self, unit: Unit) -> Path:
        return unusable_directory(self.gains) / f"{unit.uid}.parquet"
