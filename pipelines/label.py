"""Label: the teacher's answers for the chosen rows, written as shards of soft labels.

A worker reads a shard's rows, asks the teacher in batches, attaches the estimates (`alpha`, `candidates`, `weight`),
writes the shard and then its manifest entry, which is the commit. Rows that the teacher cannot answer go to the dead
letters with stage, error and number of attempts, and cost their neighbours nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import log_softmax

from distilbeam.pipelines.content_ids import content_ids
from distilbeam.pipelines.estimates import Estimates
from distilbeam.pipelines.files import write_parquet
from distilbeam.pipelines.models import cached_student, cached_teacher
from distilbeam.pipelines.reuse import known_logprobs
from distilbeam.pipelines.score import unit_name
from distilbeam.pipelines.shards import PICK_FIELDS, Shard, read_rows
from distilbeam.teacher.asking import RowError, ask
from distilbeam.teacher.protocol import Teacher
from distilbeam.teacher.softlabels import SoftLabelSpec, encode, entry_path, write_shard

_ANSWERED = b"distilbeam.answered"


@dataclass
class _Tally:
    calls: int = 0
    requests: int = 0
    reused: int = 0
    answered: int = 0
    failures: list[dict[str, object]] = field(default_factory=list)


@dataclass(frozen=True)
class Label:
    """The work of the label phase.

    Attributes:
      teacher: the teacher, as `models.teacher_text` describes it.
      spec: how answers are stored; its fingerprint must be the loaded teacher's.
      output: directory of the soft-label dataset.
      dead_letters: directory for rows that could not be labelled.
      columns: pool columns to read.
      id_column: column with the user's ids, or None for the hash of the carried columns.
      picks: directory of the picks, or None to label every row.
      teacher_batch: most rows in one request to the teacher.
      batch_rows: rows read and asked at a time.
      estimates: `Estimates` as text, or None for labels without them.
      student: checkpoint whose logits the weights need; given together with `estimates`.
      reuse: datasets of the same teacher and specification whose answers are copied instead of asked again.
    """

    teacher: str
    spec: SoftLabelSpec
    output: str
    dead_letters: str
    columns: tuple[str, ...]
    id_column: str | None
    picks: str | None
    teacher_batch: int
    batch_rows: int
    estimates: str | None = None
    student: str | None = None
    reuse: tuple[str, ...] = ()

    def __call__(self, shard: Shard) -> None:
        """Label the shard's rows and commit them."""
        teacher = self._checked_teacher()
        tally, start = _Tally(), time.perf_counter()
        labelled = [self._answer(teacher, rows, tally) for rows in self._rows(shard)]
        if tally.failures:
            self._write_dead_letters(shard, tally)
        if tally.answered:
            extra = {
                "calls": tally.calls,
                "requests": tally.requests,
                "reused": tally.reused,
                "failed": len(tally.failures),
                "seconds": round(time.perf_counter() - start, 4),
            }
            table = pa.concat_tables(batch for batch in labelled if batch.num_rows)
            write_shard(self.output, shard.key, table, self.spec, shard.key, extra)

    def done(self, shard: Shard) -> bool:
        """Tell whether the shard is committed: by its manifest entry, or by dead letters for every one of its rows."""
        return entry_path(self.output, shard.key).exists() or self._all_failed(shard)

    def name(self, shard: Shard) -> str:
        """Name the shard by its first rows."""
        return f"shard {shard.key} ({shard.rows:,} rows, from {unit_name(shard.parts[0].unit)})"

    def _checked_teacher(self) -> Teacher:
        teacher = cached_teacher(self.teacher)
        loaded = teacher.fingerprint()
        if loaded != self.spec.teacher:
            raise ValueError(
                f"the teacher changed: these labels are of {self.spec.teacher}, the worker has loaded {loaded}; "
                "put the former teacher back or start a new run directory"
            )
        return teacher

    def _rows(self, shard: Shard) -> Iterator[pa.Table]:
        """Read the shard's rows in tables of about `batch_rows` rows, so that requests to the teacher are full."""
        waiting: list[pa.Table] = []
        for part in shard.parts:
            for table in read_rows(part, self.columns, self.picks, self.batch_rows):
                waiting.append(table)
                if sum(t.num_rows for t in waiting) >= self.batch_rows:
                    yield pa.concat_tables(waiting)
                    waiting = []
        if waiting:
            yield pa.concat_tables(waiting)

    def _answer(self, teacher: Teacher, rows: pa.Table, tally: _Tally) -> pa.Table:
        logits, failed = self._logits(teacher, rows, tally)
        good = np.flatnonzero(~np.isnan(logits).any(axis=1))
        ids = self._ids(rows)
        tally.answered += len(good)
        tally.failures += [
            {"example_id": ids[e.row].as_py(), "pool_row": rows["pool_row"][e.row].as_py(), "stage": e.stage, "error": e.error, "attempts": e.attempts}
            for e in failed
        ]
        rows, logits = rows.take(good), logits[good]
        columns: dict[str, pa.Array] = {"example_id": ids.take(pa.array(good)), "pool_row": rows["pool_row"]}
        columns |= {name: rows[name] for name in self.spec.carried}
        labels = encode(logits, self.spec, rng=self._rng(rows))
        columns |= dict(zip(labels.schema.names, labels.columns, strict=True))
        columns |= {f.name: rows[f.name] for f in PICK_FIELDS if f.name in rows.column_names}
        if self.estimates is not None and self.student is not None and len(good):
            batch = rows.combine_chunks().to_batches()[0]
            student_logits = cached_student(self.student).logits(batch)
            columns |= Estimates.from_text(self.estimates).columns(log_softmax(logits, axis=1), student_logits)
        return pa.table(columns)

    def _logits(self, teacher: Teacher, rows: pa.Table, tally: _Tally) -> tuple[npt.NDArray[np.float32], Sequence[RowError]]:
        logits = known_logprobs(self.reuse, self.spec, rows["pool_row"].to_numpy())
        unknown = np.flatnonzero(np.isnan(logits).any(axis=1))
        tally.reused += rows.num_rows - len(unknown)
        if not len(unknown):
            return logits, ()
        batch = rows.take(unknown).combine_chunks().to_batches()[0]
        answers = ask(teacher, batch, self.spec.num_classes, batch_size=self.teacher_batch)
        logits[unknown] = answers.logits
        tally.calls += answers.calls
        tally.requests += answers.requests
        return logits, [RowError(int(unknown[e.row]), e.stage, e.error, e.attempts) for e in answers.errors]

    def _ids(self, rows: pa.Table) -> pa.Array:
        if self.id_column is not None:
            ids = rows[self.id_column].combine_chunks()
            return ids if pa.types.is_string(ids.type) or pa.types.is_binary(ids.type) else ids.cast(pa.string())
        return pa.array(content_ids(rows.select(self.spec.carried)), pa.binary(16))

    def _rng(self, rows: pa.Table) -> np.random.Generator:
        """Seed the draws of sampled labels by the rows, so that a repeated shard draws the same."""
        digest = hashlib.blake2b(rows["pool_row"].to_numpy().tobytes() + self.spec.teacher.encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))

    def _dead_letter_file(self, shard: Shard) -> Path:
        return Path(self.dead_letters) / f"{shard.key}.parquet"

    def _write_dead_letters(self, shard: Shard, tally: _Tally) -> None:
        table = pa.Table.from_pylist(tally.failures)
        write_parquet(self._dead_letter_file(shard), table.replace_schema_metadata({_ANSWERED: str(tally.answered)}))

    def _all_failed(self, shard: Shard) -> bool:
        path = self._dead_letter_file(shard)
        return path.exists() and pq.read_metadata(path).metadata[_ANSWERED] == b"0"

