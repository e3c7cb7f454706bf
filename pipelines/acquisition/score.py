"""The score phase: what the current student would gain from each example's label, per unit, with the unit's sketch.

A unit's file `gains/<uid>.parquet` has the columns `row` (int64, row of the unit) and `gain` (float32, >= 0) for the rows
that were not bought in an earlier round and that the student can read (see `unusable_rows`), and the unit's `GainSketch` in
its footer. The driver reads footers to solve the game and reads gains again only to refine and to round; it never scores a
unit twice, so that another processor's rounding cannot change a choice that was made.

Where examples will be compared with each other, `embeddings/<uid>.parquet` beside it has `row` and, as the strategy reads
them, `embedding` (float32 [d], what the student's last layer sees) and `logits` (float32 [C]) of a random part of these rows.
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.acquisition.unusable_rows import unusable_directory, unusable_table
from distilbeam.pipelines.acquisition.usable_answers import ask_student
from distilbeam.pipelines.engine.counters import count, count_seconds, timed
from distilbeam.pipelines.engine.model_cache import cached_student
from distilbeam.pipelines.engine.prefetch import read_from
from distilbeam.pipelines.pool.read_splits import answered_rows, read_unit
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.selection.gains import gain_named
from distilbeam.selection.rounding import shard_rng
from distilbeam.selection.sketch.gain_sketch import GainSketch
from distilbeam.storage.atomic import move_flushed, temporary_name
from distilbeam.teacher.softlabels.columns import flat_values

# rows are ascending; gains are noise to a compressor
_ENCODING: Any = {"compression": "none", "use_dictionary": False, "column_encoding": {"row": "DELTA_BINARY_PACKED"}}
_SKETCH_KEY = b"distilbeam.sketch"
_KEPT_COLUMNS = {"embeddings": "embedding", "logits": "logits"}


@dataclass(frozen=True)
class Candidates:
    """Which rows are candidates of a choice that compares them.

    Attributes:
      share: share of the rows that are candidates, in (0, 1].
      seed: the run's seed, from which each unit's draw is derived.
      round: number of the round, part of that seed: each round draws others.
      output: directory of the embeddings.
      kept: what is kept of them, "embeddings", "logits" or both.
    """

    share: float
    seed: int
    round: int
    output: str
    kept: tuple[str, ...] = ("embeddings",)

    def drawn(self, uid: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Draw the candidates among a unit's rows, the same ones each time."""
        if self.share >= 1:
            return rows
        rng: np.random.Generator = shard_rng(self.seed, self.round, f"candidates {uid}")
        return rows[rng.random(len(rows)) < self.share]


class UnitFiles(ABC):
    """Work of a phase over units, each of which has one file that commits it."""

    @abstractmethod
    def _file(self, unit: Unit) -> Path:
        """Return the path of a unit's file."""

    def settle(self, ends: Sequence[tuple[Path, Path]]) -> None:
        """Flush files to the disk and give them their names, in the order in which they were written."""
        move_flushed(dict(ends))

    def remaining(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units whose files are not committed."""
        files = [self._file(unit) for unit in units]
        there = {path for folder in {file.parent for file in files} for path in folder.glob("*.parquet")}
        return [unit for unit, file in zip(units, files, strict=True) if file not in there]

    def name(self, unit: Unit) -> str:
        """Name the unit by its file and rows."""
        return unit_name(unit)

    def rows(self, unit: Unit) -> int:
        """Return the unit's rows."""
        return unit.rows


@dataclass(frozen=True)
class Score(UnitFiles):
    """The work of the score phase.

    Attributes:
      student: directory of the student's checkpoint.
      gain: name of the gain, one of `selection.gains.GAINS`.
      output: directory of the gains files.
      bought: directories with the picks of earlier rounds.
      columns: pool columns that the student reads.
      batch_rows: rows scored at a time; fewer where they are large or of many classes.
      candidates: whose embeddings or logits to keep, or None.
      trust: modules whose code the student may call; see `student.trust`.
    """

    student: str
    gain: str
    output: str
    bought: tuple[str, ...]
    columns: tuple[str, ...]
    batch_rows: int
    candidates: Candidates | None = None
    trust: tuple[str, ...] = ()

    def __call__(self, unit: Unit) -> Iterator[tuple[Path, Path]]:
        """Begin to read the unit, where that pays; what is returned scores it and yields the gains' temporary and final file."""
        batch_rows = answered_rows(self.batch_rows, len(cached_student(self.student, self.trust).classes))
        return self._score(unit, read_from(unit.path, read_unit(unit, self.columns, batch_rows)))

    def _score(self, unit: Unit, read: Iterator[tuple[pa.RecordBatch, float]]) -> Iterator[tuple[Path, Path]]:
        rows = unbought_rows(unit, self.bought)
        wanted = self.candidates.drawn(unit.uid, rows) if self.candidates is not None else rows[:0]
        parts, first = [], 0
        kept: dict[str, list[npt.NDArray[np.float32]]] = {}
        reasons: dict[int, str] = {}
        for batch, seconds in read:
            count_seconds("read", seconds)
            with timed("score"):
                gains, seen, unusable = self._scored(batch, wanted - first)
            parts.append(gains)
            for name, values in seen.items():
                kept.setdefault(name, []).append(values)
            reasons |= {first + row: reason for row, reason in unusable.items()}
            first += len(batch)
        count("rows_scored", unit.rows)
        if reasons:
            bad = np.array([*reasons])
            rows, wanted = rows[~np.isin(rows, bad)], wanted[~np.isin(wanted, bad)]
            count("rows_unusable", len(reasons))
            with timed("write"):
                file = unusable_directory(self.output) / f"{unit.uid}.parquet"
                yield written(file, unusable_table(unit, reasons), {})
        if self.candidates is not None:
            columns = {
                name: np.concatenate(kept[name]) if name in kept else np.empty((0, 1), np.float32)
                for name in self.candidates.kept
            }
            with timed("write"):
                yield written(embeddings_file(self.candidates.output, unit), candidates_table(wanted, columns))
        with timed("write"):
            yield written(self._file(unit), gains_table(rows, np.concatenate(parts)[rows]))

    def _scored(
        self, batch: pa.RecordBatch, wanted: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float32], dict[str, npt.NDArray[np.float32]], dict[int, str]]:
        """Compute a batch's gains, what is kept of those of its rows that are wanted, and why rows have neither."""
        kept = self.candidates.kept if self.candidates is not None else ()
        said = ask_student(cached_student(self.student, self.trust), batch, "embeddings" in kept)
        gains = np.full(batch.num_rows, np.nan, np.float32)
        gains[said.rows] = gain_named(self.gain)(said.logits)
        if not kept or not len(said.rows):
            return gains, {}, said.reasons
        mine = np.isin(said.rows, wanted)
        seen = {"embeddings": said.embeddings, "logits": said.logits}
        return gains, {name: np.asarray(seen[name], np.float32)[mine] for name in kept}, said.reasons

    def _file(self, unit: Unit) -> Path:
        return gains_file(self.output, unit)


def unit_name(unit: Unit) -> str:
    """Name a unit by its file and rows, for errors."""
    return f"{unit.path} rows {unit.first_row:,}-{unit.first_row + unit.rows - 1:,}"


def gains_file(directory: str | Path, unit: Unit) -> Path:
    """Return the path of a unit's gains."""
    return Path(directory) / f"{unit.uid}.parquet"


def embeddings_file(directory: str | Path, unit: Unit) -> Path:
    """Return the path of the embeddings of a unit's candidates."""
    return Path(directory) / f"{unit.uid}.parquet"


def picks_file(directory: str | Path, unit: Unit) -> Path:
    """Return the path of what was chosen of a unit; a unit of which nothing was chosen has none."""
    return Path(directory) / f"{unit.uid}.parquet"


def unbought_rows(unit: Unit, bought: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Return the unit's rows, ascending, that none of the `bought` picks directories holds."""
    free = np.ones(unit.rows, bool)
    for directory in bought:
        file = picks_file(directory, unit)
        if file.exists():
            free[pq.read_table(file, columns=["row"])["row"].to_numpy()] = False
    return np.flatnonzero(free).astype(np.int64)


def read_gains(directory: str | Path, unit: Unit) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Read a unit's rows and gains."""
    table = pq.read_table(gains_file(directory, unit))
    return table["row"].to_numpy(), table["gain"].to_numpy()


def read_sketches(directory: str | Path, units: tuple[Unit, ...]) -> Iterator[GainSketch]:
    """Read the units' sketches from the footers of their gains."""
    for unit in units:
        metadata = pq.read_metadata(gains_file(directory, unit)).metadata
        yield GainSketch.from_bytes(base64.b64decode(metadata[_SKETCH_KEY]))


def read_candidates(
    directory: str | Path, unit: Unit, kept: Sequence[str]
) -> tuple[npt.NDArray[np.int64], dict[str, npt.NDArray[np.float32]]]:
    """Read the rows of a unit's candidates, ascending, and what is kept of them, float32 [candidates, d] each."""
    table = pq.read_table(embeddings_file(directory, unit))
    columns = {name: table[_KEPT_COLUMNS[name]].combine_chunks() for name in kept}
    return table["row"].to_numpy(), {name: flat_values(c, c.type.list_size) for name, c in columns.items()}


def gains_table(rows: npt.NDArray[np.int64], gains: npt.NDArray[np.float32]) -> pa.Table:
    """Lay a unit's gains out as its file has them, with their sketch."""
    sketch = GainSketch()
    sketch.add(gains)
    table = pa.table({"row": rows, "gain": gains})
    return table.replace_schema_metadata({_SKETCH_KEY: base64.b64encode(sketch.to_bytes())})


def candidates_table(rows: npt.NDArray[np.int64], kept: Mapping[str, npt.NDArray[np.float32]]) -> pa.Table:
    """Lay out what is kept of a unit's candidates, float32 [candidates, d] each, as their file has it."""
    columns = {
        _KEPT_COLUMNS[name]: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        for name, values in kept.items()
    }
    return pa.table({"row": rows, **columns})


def written(file: Path, table: pa.Table, encoding: dict[str, Any] = _ENCODING) -> tuple[Path, Path]:
    """Write a table under a temporary name; return that and the file's own, for `UnitFiles.settle`."""
    temporary = temporary_name(file)
    pq.write_table(table, temporary, **encoding)
    return temporary, file
