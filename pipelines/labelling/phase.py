"""The label phase: asks the teacher about rows and commits shards of soft labels.

A worker reads the rows of each shard of its task, labels them and places the shard; flushing it to the disk and its
manifest entry, which is the commit, follow while the next one is labelled. A killed process loses no placed shard, and of
the one that it was labelling no more than the answers of the last `flush_s` seconds. Rows that the teacher cannot answer go
to the dead letters with file, row, stage, error and number of attempts, and cost their neighbours nothing. Rows of which
the process dies are found in a process apart, and are dead letters, too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.acquisition.score import unit_name
from distilbeam.pipelines.engine.counters import count, count_seconds, timed
from distilbeam.pipelines.engine.prefetch import read_from
from distilbeam.pipelines.engine.stopping import cannot_be_written, stop_everybody
from distilbeam.pipelines.labelling import saved_answers
from distilbeam.pipelines.labelling.dead_letters import (
    attempts_before,
    letters_table,
    none_answered,
    write_letters,
)
from distilbeam.pipelines.labelling.in_flight import read_flights
from distilbeam.pipelines.labelling.label_rows import ROW, Labelled, Labelling
from distilbeam.pipelines.labelling.saved_answers import PLACE, Answered
from distilbeam.pipelines.labelling.shard_plan import Part, Shard, Task, read_rows
from distilbeam.pipelines.labelling.shard_rows import located, numbered, parts_left, parts_with_rows, places_done
from distilbeam.pipelines.labelling.shard_work import COSTS, ShardSettings, ShardWork, has_kept, part_rows
from distilbeam.pipelines.pool.read_splits import BATCH_BYTES, DamagedFileError, answered_rows, require_unchanged
from distilbeam.pipelines.pool.row_reader import RowReader
from distilbeam.storage.paths import is_remote, list_files, readable, to_path
from distilbeam.teacher.softlabels import ManifestEntry, entry_path
from distilbeam.teacher.softlabels.manifest import manifest_files, read_entries
from distilbeam.teacher.softlabels.placing import commit_placed, place_shard, placed_entry

log = logging.getLogger("distilbeam.label")


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
      flush_s: seconds after which the answers to a part of a shard are saved.
      retry: whether rows that failed before are asked again.
    """

    labelling: Labelling
    output: str
    dead_letters: str
    columns: tuple[str, ...]
    picks: str | None
    batch_rows: int
    growing: bool = False
    max_failures: int | None = None
    flush_s: float = 60.0
    retry: bool = True

    def __call__(self, task: Task) -> Iterator[ManifestEntry]:
        """Begin to read the rows of the task's shards, where that pays; see `prefetch.read_from`.

        Returns:
          What labels them, places one shard after the other, and yields the entries to be committed. It raises
          `ValueError` when more rows failed than `max_failures`.
        """
        return self._label_all(read_from(task.shards[0].parts[0].unit.path, self._to_label(task)))

    def settle(self, ends: Sequence[ManifestEntry]) -> None:
        """Flush placed shards to the disk and commit them; what was saved of them is no longer needed."""
        try:
            commit_placed(self.output, ends)
        except OSError:
            stop_everybody()
            raise
        saved_answers.forget(self.output, [end.key for end in ends if has_kept(self.output, end.key)])

    def dangers(self) -> frozenset[tuple[str, int, int]]:
        """List which rows of which shards were being asked about when a process died, and are not labelled since."""
        found = read_flights(self._flights) if self._flights is not None else ()
        return frozenset((flight.shard, flight.start, flight.stop) for flight in found if flight.suspect)

    def at_work(self) -> bool:
        """Tell whether a process that this machine sees still asks about rows."""
        return any(flight.alive for flight in read_flights(self._flights)) if self._flights is not None else False

    def tidy(self, finished: bool) -> None:
        """Remove what is left over of shards that are committed; of all where everything is finished."""
        flights = read_flights(self._flights) if self._flights is not None else ()
        gone = [flight for flight in flights if not flight.alive]
        if gone or saved_answers.has_saved(self.output):
            done = _committed_keys(self.output)
            done |= self._all_failed(done)
            if finished:
                saved_answers.forget_all(self.output)
            for flight in gone:
                if finished or flight.shard in done or not flight.suspect:
                    flight.path.unlink(missing_ok=True)
        saved_answers.tidy(self.output)

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
        rows = answered_rows(self.batch_rows, self.labelling.spec.answer_width)
        return max(rows, min(self.batch_rows, self.labelling.teacher_batch))

    @property
    def _flights(self) -> Path | None:
        """Folder of what is in flight; an object store has no locks."""
        output = to_path(self.output)
        return None if is_remote(output) else output / saved_answers.FOLDER

    def _to_label(self, task: Task) -> Iterator[tuple[Shard, pa.Table | Answered | ManifestEntry]]:
        """Read the shards that are to be labelled.

        One that a killed process had placed comes as its entry, and answers that it had saved come before the other rows.
        """
        any_saved = saved_answers.has_saved(self.output)
        all_saved = saved_answers.saved(self.output, self.labelling.spec.to_json()) if any_saved else []
        reader = RowReader(self.columns, self.rows_at_once)
        for shard in task.shards:
            if entry_path(self.output, shard.key).exists():  # another worker may have been given it too
                continue
            if (entry := placed_entry(self.output, shard.key)) is not None:
                yield shard, entry
                continue
            parts = part_rows(shard)
            kept = [found for answered in all_saved if (found := answered.of_shard(parts)) is not None]
            if self.picks is None:
                kept = [numbered(answered, shard) for answered in kept]
            if self.retry:
                kept = [replace(answered, failures=[]) for answered in kept]
            yield from ((shard, answered) for answered in kept)
            for rows in self._rows(shard, places_done(kept, shard.rows), reader):
                yield shard, rows

    def _label_all(self, read: Iterator[tuple[tuple[Shard, Any], float]]) -> Iterator[ManifestEntry]:
        for shard, parts in groupby(read, key=lambda part: part[0][0]):
            entry = self._label(shard, ((found, seconds) for (_, found), seconds in parts))
            if entry is not None:
                yield entry

    def _label(self, shard: Shard, read: Iterator[tuple[Any, float]]) -> ManifestEntry | None:
        start = time.perf_counter()
        work = ShardWork(self._settings_for(shard))
        try:
            for found, seconds in read:
                if isinstance(found, ManifestEntry):
                    return found
                if isinstance(found, Answered):
                    work.resume(found)
                    continue
                count_seconds("read", seconds)
                work.ask(found.drop_columns([PLACE]), found[PLACE].to_numpy())
            entry = self._finish(shard, work.result(), time.perf_counter() - start)
            work.clear_suspects()
        except (Exception, KeyboardInterrupt) as e:
            if cannot_be_written(e) or isinstance(e, TooManyFailures):
                stop_everybody()
            _save(work, shard)
            raise
        finally:
            work.close()
        return entry

    def _settings_for(self, shard: Shard) -> ShardSettings:
        flights = self._flights
        found = read_flights(flights) if flights is not None else ()
        return ShardSettings(
            labelling=self.labelling,
            output=self.output,
            shard=shard,
            flush_s=self.flush_s,
            flights=flights,
            suspects=tuple(flight for flight in found if flight.shard == shard.key and flight.suspect),
            require_few=partial(self._require_few, shard),
        )

    def _finish(self, shard: Shard, answered: Answered, seconds: float) -> ManifestEntry | None:
        """Write the dead letters and the shard.

        Raises:
          ValueError: a file was replaced meanwhile: what was read is not committed under the key of what was there before.
        """
        for unit in {part.unit.path: part.unit for part in shard.parts}.values():
            require_unchanged(unit)
        if answered.failures:
            self._write_dead_letters(shard, answered.failures, answered.table.num_rows)
            count("dead_letters", len(answered.failures))
        if not answered.table.num_rows:
            saved_answers.forget(self.output, [shard.key] if has_kept(self.output, shard.key) else [])
            return None
        facts = {**answered.costs, "failed": len(answered.failures), "seconds": round(seconds, 4)}
        return self.place(shard, answered.table, facts)

    def keep(self, shard: Shard, parts: Sequence[Labelled]) -> None:
        """Commit rows that were labelled elsewhere: those of a sample."""
        tables = [part.table for part in parts if part.table.num_rows]
        table = pa.concat_tables(tables) if tables else pa.table({})
        costs = {name: sum(getattr(part, name) for part in parts) for name in COSTS}
        failures = [failure for part in parts for failure in part.failures]
        entry = self._finish(shard, Answered(table, np.arange(table.num_rows), failures, costs), 0.0)
        if entry is not None:
            self.settle([entry])

    def place(self, shard: Shard, table: pa.Table, facts: dict[str, Any]) -> ManifestEntry:
        """Write a shard of labelled rows; `settle` commits it."""
        if self.growing:
            facts |= parts_with_rows(shard, table[ROW].to_numpy())
            table = table.drop_columns([ROW])
        with timed("write"):
            entry = place_shard(self.output, table, self.labelling.spec, shard.key, facts)
        count("rows_labelled", entry.rows)
        count("bytes_written", entry.bytes)
        return entry

    def _rows(self, shard: Shard, done: npt.NDArray[np.bool_] | None, reader: RowReader) -> Iterator[pa.Table]:
        """Read the shard's rows in tables of about `batch_rows` rows, so that requests to the teacher are full.

        Their column `saved_answers.PLACE` is the row of the shard.

        Raises:
          DamagedFileError: after all that can be read was given.
        """
        waiting: list[pa.Table] = []
        waiting_rows = size = 0
        damage: list[DamagedFileError] = []
        for part, place in parts_left(shard, done):
            for table in self._numbered_rows(part, place, reader, damage):
                waiting.append(table)
                waiting_rows, size = waiting_rows + table.num_rows, size + table.nbytes
                if waiting_rows >= self.rows_at_once or size >= BATCH_BYTES:
                    yield pa.concat_tables(waiting)
                    waiting, waiting_rows, size = [], 0, 0
        if waiting:
            yield pa.concat_tables(waiting)
        if damage:  # the answers to the others are saved, and are not asked for again when the file is mended or gone
            raise damage[0]

    def _numbered_rows(
        self, part: Part, place: int, reader: RowReader, damage: list[DamagedFileError]
    ) -> Iterator[pa.Table]:
        """Read a part in tables with their rows' places in the shard, up to where the file is damaged."""
        try:
            for read in read_rows(reader, part, self.picks):
                table = read.append_column(PLACE, pa.array(np.arange(place, place + read.num_rows)))
                for name, column in self.labelling.question_column(read).items():  # often in a thread of its own here
                    table = table.append_column(name, column)
                place += read.num_rows
                yield table
        except DamagedFileError as e:
            damage.append(e)

    def _require_few(self, shard: Shard, failed: int, last: str) -> None:
        """Raise an error where more rows have no answer, in the whole job and in all workers, than are allowed."""
        if self.max_failures is None:
            return
        own = self._dead_letter_file(shard)
        others = (path for path in list_files(to_path(self.dead_letters), "*.parquet") if path != own)
        failed += sum(pq.read_metadata(readable(path)).num_rows for path in others)
        if self._flights is not None:
            written = {path.stem for path in list_files(to_path(self.dead_letters), "*.parquet")}
            flights = (flight for flight in read_flights(self._flights) if flight.alive)
            failed += sum(flight.failed for flight in flights if flight.shard not in {shard.key, *written})
        if failed > self.max_failures:
            raise TooManyFailures(
                f"{failed:,} rows have no label, engine.max_failures allows {self.max_failures:,}; the last one: {last}; "
                f"mend the teacher or the rows (see {self.dead_letters}), or allow more"
            )

    def _dead_letter_file(self, shard: Shard) -> Path:
        return to_path(self.dead_letters) / f"{shard.key}.parquet"

    def _write_dead_letters(self, shard: Shard, failures: list[dict[str, Any]], answered: int) -> None:
        before = attempts_before(to_path(self.dead_letters), shard.key)
        letters = [located(failure, shard) for failure in failures]
        for letter in letters:
            letter["attempts"] += before.get((letter["file"], letter["row"]), 0)
        write_letters(self._dead_letter_file(shard), letters_table(letters), answered)

    def _all_failed(self, committed: set[str]) -> set[str]:
        """List the shards of which every row is in the dead letters, `committed` ones apart."""
        letters = (path for path in list_files(to_path(self.dead_letters), "*.parquet") if path.stem not in committed)
        return {path.stem for path in letters if none_answered(path)}


class TooManyFailures(ValueError):  # noqa: N818  (named after what happened)
    """More rows have no answer than `engine.max_failures` allows."""


def _save(work: ShardWork, shard: Shard) -> None:
    """Save what was answered; the error that ends the work is the one to raise."""
    try:
        work.save()
    except OSError as e:
        log.error("the answers to a part of shard %s could not be kept: %s", shard.key, e)


def _committed_keys(dataset: str) -> set[str]:
    """List the keys of committed shards without reading their entries: an entry's file is named by its key."""
    files = manifest_files(to_path(dataset))
    packed = tuple((file, file.stat().st_mtime_ns) for file in files if file.suffix == ".jsonl")
    return {file.stem for file in files if file.suffix == ".json"} | _packed_keys(packed)


@lru_cache(maxsize=16)
def _packed_keys(files: tuple[tuple[Path, int], ...]) -> set[str]:
    return {entry.key for entry in read_entries([file for file, _changed in files])}
