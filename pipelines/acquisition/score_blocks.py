"""The score phase of a language model: what the current student is unsure of in each block that nobody has labelled, per unit.

A unit's files are those of `score`: gains with their sketch, and a vector for each candidate, mean-pooled hidden states. Blocks that
were bought are not scored: a forward pass costs more than reading. A block is left out, with the reason, where it has no labelled
position, an id beyond the vocabulary of the labels, or an answer that is not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.blocks import BLOCK_COLUMNS, COMPLETION_MASK, INPUT_IDS, SEGMENT_IDS, has_label
from distilbeam.pipelines.acquisition.score import (
    Candidates,
    UnitFiles,
    candidates_table,
    embeddings_file,
    gains_file,
    gains_table,
    unbought_rows,
    written,
)
from distilbeam.pipelines.acquisition.unusable_rows import unusable_directory, unusable_table
from distilbeam.pipelines.engine.counters import count, count_seconds, timed
from distilbeam.pipelines.engine.model_cache import cached_language_model
from distilbeam.pipelines.engine.prefetch import read_from
from distilbeam.pipelines.pool.read_splits import read_unit
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.teacher.softlabels.columns import flat_values

NOT_FINITE = "the student's answer to it is not finite"
NO_LABEL = "no position of it has a label: each text has one token, or the completion mask leaves all out"


@dataclass(frozen=True)
class ScoreBlocks(UnitFiles):
    """The work of the phase.

    Attributes:
      student: directory of the student.
      gain: name of the gain, a key of `scoring.UNCERTAINTIES`.
      output: directory of the gains files.
      bought: directories with the picks of earlier rounds.
      num_classes: ids that the labels know.
      batch_rows: blocks read at a time.
      device: of torch, where the student computes.
      candidates: whose vectors to keep, or None.
      trust: modules whose code the student may call; see `student.trust`.
    """

    student: str
    gain: str
    output: str
    bought: tuple[str, ...]
    num_classes: int
    batch_rows: int
    device: str = "cpu"
    candidates: Candidates | None = None
    trust: tuple[str, ...] = ()

    def __call__(self, unit: Unit) -> Iterator[tuple[Path, Path]]:
        """Begin to read the unit, where that pays; what is returned scores it and yields the gains' temporary and final file."""
        return self._score(unit, read_from(unit.path, read_unit(unit, BLOCK_COLUMNS, self.batch_rows)))

    def _score(self, unit: Unit, read: Iterator[tuple[pa.RecordBatch, float]]) -> Iterator[tuple[Path, Path]]:
        rows = unbought_rows(unit, self.bought)
        wanted = self.candidates.drawn(unit.uid, rows) if self.candidates is not None else rows[:0]
        gains, vectors, reasons, first = [], [], dict[int, str](), 0
        for batch, seconds in read:
            count_seconds("read", seconds)
            mine = rows[(rows >= first) & (rows < first + batch.num_rows)] - first
            with timed("score"):
                found, seen, unusable = self._scored(batch.take(pa.array(mine)))
            reasons |= {first + int(mine[place]): why for place, why in unusable.items()}
            kept = ~np.isnan(found)
            gains.append(found[kept])
            vectors.append(seen[kept][np.isin(first + mine[kept], wanted)])
            first += batch.num_rows
        count("rows_scored", len(rows))
        if reasons:
            bad = np.array([*reasons])
            rows, wanted = rows[~np.isin(rows, bad)], wanted[~np.isin(wanted, bad)]
            count("rows_unusable", len(reasons))
            with timed("write"):
                yield written(
                    unusable_directory(self.output) / f"{unit.uid}.parquet", unusable_table(unit, reasons), {}
                )
        if self.candidates is not None:
            some = [part for part in vectors if len(part)]
            table = candidates_table(
                wanted, {"embeddings": np.concatenate(some) if some else np.empty((0, 1), np.float32)}
            )
            with timed("write"):
                yield written(embeddings_file(self.candidates.output, unit), table)
        with timed("write"):
            yield written(self._file(unit), gains_table(rows, np.concatenate([*gains, np.empty(0, np.float32)])))

    def _scored(self, batch: pa.RecordBatch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], dict[int, str]]:
        """Score blocks: gains, NaN where there is none, vectors, and why blocks have none."""
        from distilbeam.student.language.scoring import score_blocks
        from distilbeam.teacher.backends.torch import find_device

        device = find_device(self.device, "training.device")
        blocks = arrays_of(batch)
        beyond = (blocks[INPUT_IDS] < 0) | (blocks[INPUT_IDS] >= self.num_classes)
        reasons = {
            int(row): f"id {blocks[INPUT_IDS][row][beyond[row]][0]:,} is none of the {self.num_classes:,} of the labels"
            for row in np.flatnonzero(beyond.any(axis=1))
        }
        labelled = has_label(blocks[SEGMENT_IDS], blocks[COMPLETION_MASK]).any(axis=1)
        reasons = {int(row): NO_LABEL for row in np.flatnonzero(~labelled)} | reasons
        good = np.array([row for row in range(batch.num_rows) if row not in reasons], np.int64)
        network = cached_language_model(self.student, str(device), self.trust).network

        said = score_blocks(
            network,
            {name: part[good] for name, part in blocks.items()},
            self.gain,
            self.num_classes,
            device,
        )
        gains = np.full(batch.num_rows, np.nan, np.float32)
        vectors = np.full((batch.num_rows, said.embeddings.shape[1]), np.nan, np.float32)
        gains[good], vectors[good] = said.gains, said.embeddings
        return gains, vectors, reasons | {int(row): NOT_FINITE for row in good[np.isnan(said.gains)]}

    def _file(self, unit: Unit) -> Path:
        return gains_file(self.output, unit)


def arrays_of(batch: pa.RecordBatch | pa.Table) -> dict[str, npt.NDArray[Any]]:
    """Give the columns of blocks as arrays, integers [n, L]."""
    return {name: flat_values(batch.column(name), batch.schema.field(name).type.list_size) for name in BLOCK_COLUMNS}
