"""Label: the phase that asks the teacher about the chosen rows and commits shards of soft labels.

A worker reads the rows of each shard of its task, labels them, and writes the shard and then its manifest entry, which
is the commit. Rows that the teacher cannot answer go to the dead letters with stage, error and number of attempts, and
cost their neighbours nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.files import write_parquet
from distilbeam.pipelines.labelling import Labelled, Labelling
from distilbeam.pipelines.meter import count, timed, timed_items
from distilbeam.pipelines.row_reader import RowReader
from distilbeam.pipelines.score import unit_name
from distilbeam.pipelines.shards import Shard, Task, read_rows
from distilbeam.teacher.softlabels import committed, entry_path, write_shard

_ANSWERED = b"distilbeam.answered"


@dataclass(frozen=True)
class Label:
    """The work of the label phase.

    Attributes:
      labelling: how rows are labelled.
      output: directory of the soft-label dataset.
      dead_letters: directory for rows that could not be labelled.
      columns: pool columns to read.
      picks: directory of the picks, or None to label every row.
      batch_rows: rows read and asked at a time.
    """

    labelling: Labelling
    output: str
    dead_letters: str
    columns: tuple[str, ...]
    picks: str | None
    batch_rows: int

    def __call__(self, task: Task) -> None:
        """Label the rows of the task's shards and commit one shard after the other."""
        reader = RowReader(self.columns, self.batch_rows)
        for shard in task.shards:
            if not self.shard_done(shard):
                self._label(shard, reader)

    def done(self, task: Task) -> bool:
        """Tell whether all shards of the task are committed."""
        return all(self.shard_done(shard) for shard in task.shards)

    def name(self, task: Task) -> str:
        """Name the task by its first shard that is not committed: key and first rows."""
        shard = next((shard for shard in task.shards if not self.shard_done(shard)), task.shards[0])
        return f"shard {shard.key} ({shard.rows:,} rows, from {unit_name(shard.parts[0].unit)})"

    def rows(self, task: Task) -> tuple[int, int]:
        """Return the rows of the task's committed shards and all its rows."""
        return sum(shard.rows for shard in task.shards if self.shard_done(shard)), task.rows

    def shard_done(self, shard: Shard) -> bool:
        """Tell whether a shard is committed: by its manifest entry, or by dead letters for every one of its rows."""
        return _is_committed(self.output, shard.key) or self._all_failed(shard)

    def _label(self, shard: Shard, reader: RowReader) -> None:
        start = time.perf_counter()
        parts = [self.labelling(rows) for rows in timed_items("read", self._rows(shard, reader))]
        answered = [part.table for part in parts if part.table.num_rows]
        failures = [failure for part in parts for failure in part.failures]
        if failures:
            self._write_dead_letters(shard, failures, sum(table.num_rows for table in answered))
            count("dead_letters", len(failures))
        if answered:
            extra = {**_counts(parts), "failed": len(failures), "seconds": round(time.perf_counter() - start, 4)}
            spec = self.labelling.spec
            with timed("write"):
                entry = write_shard(self.output, shard.key, pa.concat_tables(answered), spec, shard.key, extra)
            count("rows_labelled", entry.rows)
            count("bytes_written", entry.bytes)

    def _rows(self, shard: Shard, reader: RowReader) -> Iterator[pa.Table]:
        """Read the shard's rows in tables of about `batch_rows` rows, so that requests to the teacher are full."""
        waiting: list[pa.Table] = []
        for part in shard.parts:
            for table in read_rows(reader, part, self.picks):
                waiting.append(table)
                if sum(t.num_rows for t in waiting) >= self.batch_rows:
                    yield pa.concat_tables(waiting)
                    waiting = []
        if waiting:
            yield pa.concat_tables(waiting)

    def _dead_letter_file(self, shard: Shard) -> Path:
        return Path(self.dead_letters) / f"{shard.key}.parquet"

    def _write_dead_letters(self, shard: Shard, failures: list[dict[str, object]], answered: int) -> None:
        table = pa.Table.from_pylist(failures)
        write_parquet(self._dead_letter_file(shard), table.replace_schema_metadata({_ANSWERED: str(answered)}))

    def _all_failed(self, shard: Shard) -> bool:
        path = self._dead_letter_file(shard)
        return path.exists() and bool(pq.read_metadata(path).metadata[_ANSWERED] == b"0")


def _is_committed(dataset: str, key: str) -> bool:
    """Look for an entry of its own first, then in the files into which a manifest was compacted."""
    if entry_path(dataset, key).exists():
        return True
    packed = sorted(entry_path(dataset, key).parent.glob("*.jsonl"))
    return bool(packed) and key in _keys(dataset, tuple(path.stat().st_mtime_ns for path in packed))


@lru_cache(maxsize=16)
def _keys(dataset: str, _changed: tuple[int, ...]) -> set[str]:
    return committed(dataset)


def _counts(parts: Sequence[Labelled]) -> dict[str, int]:
    return {name: sum(getattr(part, name) for part in parts) for name in ("calls", "requests", "reused")}
