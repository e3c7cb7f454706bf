"""A growing pool reconciled with its labels: what is labelled already, and what changes when files come, go or change.

A shard's manifest entry lists the units that it was made of and which of their rows it has. What the pool has, no shard has
and no dead letter names, is wanted. Labels of files that are gone are kept, for they may come back; labels of rows that a
changed file no longer has are not. A shard of which some rows do not hold is mended: the others are kept, in a shard of their
own, and nobody is asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.labelling.shard_plan import Part, pieces, range_bytes, shard_key
from distilbeam.pipelines.pool.row_ranges import from_ranges, to_ranges
from distilbeam.pipelines.pool.splits import Pool, Unit
from distilbeam.storage.paths import readable
from distilbeam.teacher.softlabels import ManifestEntry, remove_shards, write_shard

Mask = npt.NDArray[np.bool_]
Resolve = Callable[[ManifestEntry, "LabelledPart", int, Unit], tuple[int, ...] | None]


@dataclass(frozen=True)
class LabelledPart:
    """Rows `start` to `stop` of a unit, of which `rows` have a label: those of `ranges`, where the entry says which."""

    uid: str
    start: int
    stop: int
    rows: int
    ranges: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Stored:
    """A shard and what becomes of its rows.

    Attributes:
      dataset: the folder that it is in.
      entry: its manifest entry.
      parts: what it was made of; `ranges` are given.
      held: bool [rows], labels of rows of the pool.
      gone: bool [rows], labels of rows that are no longer in the pool and are kept. The others are dropped.
    """

    dataset: Path
    entry: ManifestEntry
    parts: tuple[LabelledPart, ...]
    held: Mask
    gone: Mask

    @property
    def kept(self) -> Mask:
        """Rows that stay."""
        return self.held | self.gone

    @property
    def path(self) -> Path:
        """The shard's file."""
        return self.dataset / self.entry.path

    def without(self, rows: Mask) -> Stored:
        """Drop some of the labels whose rows are gone."""
        return replace(self, gone=self.gone & ~rows)

    def place(self, row: int) -> tuple[LabelledPart, int]:
        """Return the part of a row of the shard, and the row of the unit."""
        for part in self.parts:
            if row < part.rows:
                return part, int(from_ranges(part.ranges or ())[row])
            row -= part.rows
        raise AssertionError("a shard has the rows of its parts")


@dataclass(frozen=True)
class Standing:
    """How a dataset stands to its pool.

    Attributes:
      stored: its shards.
      labelled: which rows of a unit have a label, by the unit's id; units without any are left out.
    """

    stored: tuple[Stored, ...]
    labelled: Mapping[str, Mask]

    def pruned(self) -> Standing:
        """Drop the labels of rows that are no longer in the pool."""
        return replace(self, stored=tuple(shard.without(shard.gone) for shard in self.stored))

    @property
    def rows_kept(self) -> int:
        """Labelled rows of the pool."""
        return sum(int(shard.held.sum()) for shard in self.stored)

    @property
    def rows_gone(self) -> int:
        """Labelled rows that are no longer in the pool, and are kept."""
        return sum(int(shard.gone.sum()) for shard in self.stored)

    @property
    def rows_dropped(self) -> int:
        """Labelled rows that do not hold."""
        return sum(shard.entry.rows for shard in self.stored) - self.rows_kept - self.rows_gone


def compare(
    pool: Pool, dataset: Path, entries: Sequence[ManifestEntry], *, replaced: Collection[str], resolve: Resolve
) -> Standing:
    """Compare a pool with the shards of a dataset that was made from it, or from what it was.

    Args:
      pool: the pool as it is now.
      dataset: the dataset.
      entries: its committed shards, made with `growing`.
      replaced: ids of former units whose file is there with another content.
      resolve: finds which rows of a unit a part has, which begins at a row of its shard, where its entry does not say;
        None where these rows are not there.

    Returns:
      What holds and what does not.
    """
    units = {unit.uid: unit for unit in pool.units}
    moved = _moved(entries)
    labelled: dict[str, Mask] = {}
    stored: list[Stored] = []
    for entry in entries:
        held, gone, first, parts = np.zeros(entry.rows, bool), np.zeros(entry.rows, bool), 0, []
        for part in labelled_parts(entry):
            here, unit = slice(first, first + part.rows), units.get(part.uid)
            if unit is not None:
                if part.ranges is None:
                    part = replace(part, ranges=resolve(entry, part, first, unit))
                if part.ranges is not None:
                    rows = from_ranges(part.ranges)
                    mask = labelled.setdefault(part.uid, np.zeros(unit.rows, bool))
                    held[here] = ~mask[rows]  # a mend that was cut short leaves rows in two shards
                    mask[rows] = True
            elif part.uid not in replaced:
                gone[here] = True
            parts.append(part)
            first += part.rows
        gone[from_ranges(moved.get(entry.key, ()))] = False
        stored.append(Stored(dataset, entry, tuple(parts), held, gone))
    return Standing(tuple(stored), labelled)


def wanted_pieces(unit: Unit, wanted: Mask, shard_rows: int) -> Iterator[Part]:
    """Cut the wanted rows of a unit into pieces; see `shard_plan.pieces`."""
    if not wanted.any():
        return
    for piece in pieces(unit, shard_rows):
        here = wanted[piece.start : piece.stop]
        if here.all():
            yield piece
        elif here.any():
            yield replace(piece, ranges=to_ranges(np.flatnonzero(here) + piece.start))


def mend(stored: Sequence[Stored]) -> None:
    """Take what does not hold out of a dataset. A crash in between is repaired by the next call."""
    changed = [shard for shard in stored if not shard.kept.all()]
    for shard in changed:
        if shard.kept.any():
            _mend(shard)
    for dataset in {shard.dataset for shard in changed}:
        remove_shards(dataset, {shard.entry.key for shard in changed if shard.dataset == dataset})


def labelled_parts(entry: ManifestEntry) -> list[LabelledPart]:
    """Read which rows a shard was made of.

    Raises:
      ValueError: the entry was not made by a labelling job, or contradicts itself.
    """
    if "parts" not in entry.extra:
        raise ValueError(
            f"the manifest entry of {entry.path} does not say which rows it was made of, so that it is not a labelling "
            "job's; choose another run.directory"
        )
    listed = entry.extra["parts"]
    known = entry.extra.get("rows") or [None] * len(listed)
    parts = [
        LabelledPart(uid, start, stop, labelled, _ranges(start, stop, labelled, rows))
        for (uid, start, stop, labelled), rows in zip(listed, known, strict=True)
    ]
    if sum(part.rows for part in parts) != entry.rows:
        raise ValueError(f"the manifest entry of {entry.path} has {entry.rows:,} rows, its parts have others")
    return parts


def parts_of(parts: Sequence[tuple[str, int, int, npt.NDArray[np.int64]]]) -> dict[str, Any]:
    """Describe a shard's rows for its manifest entry: unit, first row, row after the last and rows of each part."""
    return {
        "parts": [[uid, start, stop, len(rows)] for uid, start, stop, rows in parts],
        "rows": [list(to_ranges(rows)) for _, _, _, rows in parts],
    }


def _ranges(start: int, stop: int, labelled: int, rows: Sequence[int] | None) -> tuple[int, ...] | None:
    """Tell which rows a part has; entries of version 0.1 say so only where it has all or none."""
    if rows is not None:
        return tuple(rows)
    if labelled == stop - start:
        return (start, stop)
    return () if labelled == 0 else None


def _moved(entries: Sequence[ManifestEntry]) -> dict[str, tuple[int, ...]]:
    """List the rows of shards that other shards have taken over, by the key of the former."""
    found: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        for key, ranges in entry.extra.get("moved", {}).items():
            found[key] = (*found.get(key, ()), *ranges)
    return found


def _mend(shard: Stored) -> None:
    """Write the rows that hold as a shard of their own."""
    table = pq.read_table(readable(shard.path), partitioning=None, page_checksum_verification=True).filter(
        pa.array(shard.kept)
    )
    first = 0
    parts: list[tuple[LabelledPart, Mask]] = []
    for part in shard.parts:
        kept = shard.kept[first : first + part.rows]
        first += part.rows
        if kept.any():
            parts.append((part, kept))
    described = _described(parts)
    key = shard_key([(uid, text.encode()) for uid, text in _names(described)], shard.entry.spec)
    facts = {"calls": 0, "requests": 0, "reused": table.num_rows, "failed": 0, "seconds": 0.0}
    moved = {"moved": shard.entry.extra["moved"]} if "moved" in shard.entry.extra else {}
    write_shard(shard.dataset, key, table, shard.entry.spec, key, {**facts, **moved, **described})


def _described(parts: Sequence[tuple[LabelledPart, Mask]]) -> dict[str, Any]:
    """Describe the rows that are kept of a shard's parts; without saying which, where that is not known of all."""
    if all(part.ranges is not None for part, _ in parts):
        return parts_of([(p.uid, p.start, p.stop, from_ranges(p.ranges or ())[kept]) for p, kept in parts])
    return {"parts": [[p.uid, p.start, p.stop, int(kept.sum())] for p, kept in parts]}


def _names(described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name the rows of each part for the shard's key."""
    ranges = described.get("rows") or [part[1:] for part in described["parts"]]
    for (uid, start, stop, _), rows in zip(described["parts"], ranges, strict=True):
        whole = list(rows) == [start, stop]
        yield uid, range_bytes(start, stop).decode() if whole else str(tuple(rows))
