"""What of a pool that may grow is labelled already, and what changes when files come, go or change.

A shard's manifest entry lists the units that it was made of. A unit's id changes with its file, so that comparing ids
tells which labels still hold. A shard of which some units are gone is mended: the rows of the others are kept, in a shard of
their own, and nobody is asked again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.files import write_parquet
from distilbeam.pipelines.shards import Part, pieces, range_bytes, shard_key
from distilbeam.pipelines.units import Pool, Unit
from distilbeam.teacher.softlabels import ManifestEntry, remove_shards, write_shard
from distilbeam.teacher.softlabels.places import readable


@dataclass(frozen=True)
class LabelledPart:
    """Rows `start` to `stop` of a unit, of which `rows` have a label."""

    uid: str
    start: int
    stop: int
    rows: int


@dataclass(frozen=True)
class Standing:
    """How a dataset stands to its pool.

    Attributes:
      kept: entries that hold as they are.
      mended: entries of which some parts hold, with these parts.
      dropped: entries of which nothing holds: their rows are no longer in the pool.
      wanted: pieces of the pool without a label, in the pool's order.
    """

    kept: tuple[ManifestEntry, ...]
    mended: tuple[tuple[ManifestEntry, tuple[LabelledPart, ...]], ...]
    dropped: tuple[ManifestEntry, ...]
    wanted: tuple[Part, ...]

    @property
    def rows_kept(self) -> int:
        """Labelled rows that hold."""
        return sum(e.rows for e in self.kept) + sum(part.rows for _, parts in self.mended for part in parts)

    @property
    def rows_dropped(self) -> int:
        """Labelled rows that are no longer in the pool."""
        entries = [*self.kept, *(entry for entry, _ in self.mended), *self.dropped]
        return sum(entry.rows for entry in entries) - self.rows_kept

    @property
    def rows_wanted(self) -> int:
        """Rows without a label."""
        return sum(part.rows for part in self.wanted)


def compare(pool: Pool, entries: Sequence[ManifestEntry], shard_rows: int) -> Standing:
    """Compare a pool with the shards of a dataset that was made from it, or from what it was.

    Args:
      pool: the pool as it is now.
      entries: committed shards, made with `growing`.
      shard_rows: most rows in a shard; the one that the shards were made with.

    Returns:
      What holds, what does not, and what is to be labelled.
    """
    uids = {unit.uid for unit in pool.units}
    kept: list[ManifestEntry] = []
    mended: list[tuple[ManifestEntry, tuple[LabelledPart, ...]]] = []
    dropped: list[ManifestEntry] = []
    covered: dict[str, list[LabelledPart]] = {}
    for entry in entries:
        parts = labelled_parts(entry)
        holding = tuple(part for part in parts if part.uid in uids)
        for part in holding:
            covered.setdefault(part.uid, []).append(part)
        if len(holding) == len(parts):
            kept.append(entry)
        elif any(part.rows for part in holding):
            mended.append((entry, holding))
        else:
            dropped.append(entry)
    wanted = tuple(
        piece
        for unit in pool.units
        for piece in pieces(unit, shard_rows)
        if not any(part.start <= piece.start and piece.stop <= part.stop for part in covered.get(unit.uid, ()))
    )
    return Standing(tuple(kept), tuple(mended), tuple(dropped), wanted)


def apply(dataset: Path, dead_letters: Path, standing: Standing, pool: Pool) -> None:
    """Bring a dataset and its dead letters to what still holds of them. A crash in between is repaired by the next call."""
    units = {unit.uid: unit for unit in pool.units}
    for entry, parts in standing.mended:
        key = shard_key([(part.uid, range_bytes(part.start, part.stop)) for part in parts], entry.spec)
        letters = dead_letters / f"{entry.key}.parquet"
        if letters.exists():
            write_parquet(dead_letters / f"{key}.parquet", _letters_of(pq.read_table(readable(letters)), parts, units))
        _mend(dataset, entry, key, parts)
    remove_shards(dataset, {entry.key for entry in (*(entry for entry, _ in standing.mended), *standing.dropped)})


def labelled_parts(entry: ManifestEntry) -> list[LabelledPart]:
    """Read which rows a shard was made of.

    Raises:
      ValueError: the entry was not made by a labelling job.
    """
    if "parts" not in entry.extra:
        raise ValueError(
            f"the manifest entry of {entry.path} does not say which rows it was made of, so that it is not a labelling "
            "job's; choose another run.directory"
        )
    return [LabelledPart(*part) for part in entry.extra["parts"]]


def _mend(dataset: Path, entry: ManifestEntry, key: str, parts: Sequence[LabelledPart]) -> None:
    """Write the rows that hold as a shard of their own."""
    table = pq.read_table(readable(dataset / entry.path), partitioning=None, page_checksum_verification=True)
    first, slices = 0, []
    for part in labelled_parts(entry):
        if part in parts:
            slices.append(table.slice(first, part.rows))
        first += part.rows
    facts = {"calls": 0, "requests": 0, "reused": sum(part.rows for part in parts), "failed": 0, "seconds": 0.0}
    listed = [[part.uid, part.start, part.stop, part.rows] for part in parts]
    write_shard(dataset, key, pa.concat_tables(slices), entry.spec, key, {**facts, "parts": listed})


def _letters_of(letters: pa.Table, parts: Sequence[LabelledPart], units: Mapping[str, Unit]) -> pa.Table:
    """Keep the dead letters of rows of the parts."""
    holds = np.zeros(letters.num_rows, bool)
    files, rows = np.array(letters["file"].to_pylist()), letters["row"].to_numpy()
    for part in parts:
        unit = units[part.uid]
        holds |= (files == unit.path) & (rows >= unit.first_row + part.start) & (rows < unit.first_row + part.stop)
    return letters.filter(pa.array(holds))
