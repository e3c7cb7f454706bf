"""Label: the phase that asks the teacher about rows and commits shards of soft labels.

A worker reads the rows of each shard of its task, labels them and places the shard; flushing it to the disk and its
manifest entry, which is the commit, follow while the next one is labelled. A killed process loses no placed shard. Rows
that the teacher cannot answer go to the dead letters with file, row, stage, error and number of attempts, and cost their
neighbours nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.files import write_parquet
from distilbeam.pipelines.growth import parts_of
from distilbeam.pipelines.labelling import ROW, Labelled, Labelling
from distilbeam.pipelines.meter import count, count_seconds, timed
from distilbeam.pipelines.reading_ahead import read_from
from distilbeam.pipelines.row_reader import RowReader
from distilbeam.pipelines.score import unit_name
from distilbeam.pipelines.shards import Shard, Task, read_rows
from distilbeam.pipelines.units import BATCH_BYTES, answered_rows, require_unchanged
from distilbeam.teacher.softlabels import ManifestEntry, entry_path
from distilbeam.teacher.softlabels.manifest import manifest_files, read_entries
from distilbeam.teacher.softlabels.places import list_files, readable, to_path
from distilbeam.teacher.softlabels.placing import commit_placed, place_shard, placed_entry

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
      batch_rows: rows read and asked at a time; fewer where they are large or of many classes, but a whole request.
      growing: the pool may grow: shards keep no `pool_row`, and their manifest entries list the parts they were made of.
      max_failures: rows in the dead letters at which nothing more is asked; None for no limit.
    """

    labelling: Labelling
    output: str
    dead_letters: str
    columns: tuple[str, ...]
    picks: str | None
    batch_rows: int
    growing: bool = False
    max_failures: int | None = None

    def __call__(self, task: Task) -> Iterator[ManifestEntry]:
        """Begin to read the rows of the task's shards, where that pays; see `reading_ahead.read_from`.

        Returns:
          What labels them, places one shard after the other, and yields the entries to be committed. It raises
          `ValueError` when more rows failed than `max_failures`.
        """
        return self._label_all(read_from(task.shards[0].parts[0].unit.path, self._to_label(task)))

    def settle(self, ends: Sequence[ManifestEntry]) -> None:
        """Flush placed shards to the disk and commit them."""
        commit_placed(self.output, ends)

    def remaining(self, tasks: Sequence[Task]) -> list[Task]:
        """Return the tasks without their committed shards; one of which nothing remains is left out.

        A shard is committed by its manifest entry, or by dead letters for every one of its rows.
        """
        done = _committed_keys(self.output)
        done |= self._all_failed(done)
        rest = (tuple(shard for shard in task.shards if shard.key not in done) for task in tasks)
        return [Task(shards) for shards in rest if shards]

    def name(self, task: Task) -> str:
        """Name the task by its first shard: key and first rows."""
        shard = task.shards[0]
        return f"shard {shard.key} ({shard.rows:,} rows, from {unit_name(shard.parts[0].unit)})"

    def rows(self, task: Task) -> int:
        """Return the rows of the task's shards."""
        return task.rows

    @property
    def rows_at_once(self) -> int:
        """Most rows that are read and asked about at a time."""
        rows = answered_rows(self.batch_rows, self.labelling.spec.num_classes)
        return max(rows, min(self.batch_rows, self.labelling.teacher_batch))

    def _to_label(self, task: Task) -> Iterator[tuple[Shard, pa.Table | ManifestEntry]]:
        """Read the shards that are to be labelled; one that a killed process had placed comes as its entry."""
        reader = RowReader(self.columns, self.rows_at_once)
        for shard in task.shards:
            if entry_path(self.output, shard.key).exists():  # another worker may have been given it too
                continue
            if (entry := placed_entry(self.output, shard.key)) is not None:
                yield shard, entry
                continue
            for rows in self._rows(shard, reader):
                yield shard, rows

    def _label_all(self, read: Iterator[tuple[tuple[Shard, Any], float]]) -> Iterator[ManifestEntry]:
        for shard, parts in groupby(read, key=lambda part: part[0][0]):
            entry = self._label(shard, ((found, seconds) for (_, found), seconds in parts))
            if entry is not None:
                yield entry

    def _label(self, shard: Shard, read: Iterator[tuple[Any, float]]) -> ManifestEntry | None:
        start = time.perf_counter()
        failed_before = self._failed_elsewhere(shard)
        parts: list[Labelled] = []
        failures: list[dict[str, Any]] = []
        self._require_few(failed_before, failures)
        for found, seconds in read:
            if isinstance(found, ManifestEntry):
                return found
            count_seconds("read", seconds)
            parts.append(self.labelling(found))
            failures += (_located(failure, shard) for failure in parts[-1].failures)
            self._require_few(failed_before, failures)
        return self._finish(shard, parts, failures, time.perf_counter() - start)

    def keep(self, shard: Shard, parts: Sequence[Labelled]) -> None:
        """Commit rows that were labelled elsewhere: those of a sample."""
        failures = [_located(failure, shard) for part in parts for failure in part.failures]
        if (entry := self._finish(shard, parts, failures, 0.0)) is not None:
            self.settle([entry])

    def _finish(
        self, shard: Shard, parts: Sequence[Labelled], failures: list[dict[str, Any]], seconds: float
    ) -> ManifestEntry | None:
        for part in shard.parts:
            require_unchanged(part.unit)  # what was read is not committed under the key of what was there before
        answered = [part.table for part in parts if part.table.num_rows]
        if failures:
            self._write_dead_letters(shard, failures, sum(table.num_rows for table in answered))
            count("dead_letters", len(failures))
        if not answered:
            return None
        facts = {**_counts(parts), "failed": len(failures), "seconds": round(seconds, 4)}
        return self.place(shard, pa.concat_tables(answered), facts)

    def place(self, shard: Shard, table: pa.Table, facts: dict[str, Any]) -> ManifestEntry:
        """Write a shard of labelled rows; `settle` commits it."""
        if self.growing:
            facts |= _parts(shard, table[ROW].to_numpy())
            table = table.drop_columns([ROW])
        with timed("write"):
            entry = place_shard(self.output, table, self.labelling.spec, shard.key, facts)
        count("rows_labelled", entry.rows)
        count("bytes_written", entry.bytes)
        return entry

    def _rows(self, shard: Shard, reader: RowReader) -> Iterator[pa.Table]:
        """Read the shard's rows in tables of about `batch_rows` rows, so that requests to the teacher are full."""
        waiting: list[pa.Table] = []
        rows = size = 0
        for part in shard.parts:
            for table in read_rows(reader, part, self.picks):
                waiting.append(table)
                rows, size = rows + table.num_rows, size + table.nbytes
                if rows >= self.rows_at_once or size >= BATCH_BYTES:
                    yield pa.concat_tables(waiting)
                    waiting, rows, size = [], 0, 0
        if waiting:
            yield pa.concat_tables(waiting)

    def _failed_elsewhere(self, shard: Shard) -> int:
        """Count the dead letters of other shards; without a limit nobody asks."""
        if self.max_failures is None:
            return 0
        own = self._dead_letter_file(shard)
        others = (path for path in list_files(to_path(self.dead_letters), "*.parquet") if path != own)
        return sum(pq.read_metadata(readable(path)).num_rows for path in others)

    def _require_few(self, failed_before: int, failures: Sequence[dict[str, Any]]) -> None:
        failed = failed_before + len(failures)
        if self.max_failures is not None and failed > self.max_failures:
            last = f"; the last one: {failures[-1]['error']}" if failures else ""
            raise ValueError(
                f"{failed:,} rows have no label, engine.max_failures allows {self.max_failures:,}{last}; mend the teacher or "
                f"the rows (see {self.dead_letters}), or allow more"
            )

    def _dead_letter_file(self, shard: Shard) -> Path:
        return to_path(self.dead_letters) / f"{shard.key}.parquet"

    def _write_dead_letters(self, shard: Shard, failures: list[dict[str, Any]], answered: int) -> None:
        table = pa.Table.from_pylist(failures)
        write_parquet(self._dead_letter_file(shard), table.replace_schema_metadata({_ANSWERED: str(answered)}))

    def _all_failed(self, committed: set[str]) -> set[str]:
        """List the shards of which every row is in the dead letters, `committed` ones apart."""
        letters = (path for path in list_files(to_path(self.dead_letters), "*.parquet") if path.stem not in committed)
        return {path.stem for path in letters if _none_answered(path)}


def _located(failure: dict[str, Any], shard: Shard) -> dict[str, Any]:
    """Add the file and its row to a failure that knows the row of the pool."""
    row = failure[ROW]
    unit = next(p.unit for p in shard.parts if p.unit.pool_row <= row < p.unit.pool_row + p.unit.rows)
    return {**failure, "file": unit.path, "row": row - unit.pool_row + unit.first_row}


def _parts(shard: Shard, pool_rows: np.ndarray[Any, np.dtype[np.int64]]) -> dict[str, Any]:
    """Describe which rows of its parts a shard has, in the order of its rows."""
    edges = np.searchsorted(pool_rows, [[part.begin, part.end] for part in shard.parts])
    return parts_of(
        [
            (part.unit.uid, part.start, part.stop, pool_rows[first:stop] - part.unit.pool_row)
            for part, (first, stop) in zip(shard.parts, edges.tolist(), strict=True)
        ]
    )


def _none_answered(dead_letters: Path) -> bool:
    return bool(pq.read_metadata(readable(dead_letters)).metadata[_ANSWERED] == b"0")


def _committed_keys(dataset: str) -> set[str]:
    """List the keys of committed shards without reading their entries: an entry's file is named by its key."""
    files = manifest_files(to_path(dataset))
    packed = tuple((file, file.stat().st_mtime_ns) for file in files if file.suffix == ".jsonl")
    return {file.stem for file in files if file.suffix == ".json"} | _packed_keys(packed)


@lru_cache(maxsize=16)
def _packed_keys(files: tuple[tuple[Path, int], ...]) -> set[str]:
    return {entry.key for entry in read_entries([file for file, _changed in files])}


def _counts(parts: Sequence[Labelled]) -> dict[str, int]:
    return {name: sum(getattr(part, name) for part in parts) for name in ("calls", "requests", "reused")}
