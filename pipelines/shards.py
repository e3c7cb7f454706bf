"""Shards to be labelled: planned from what was chosen, before anything is asked.

Consecutive rows of consecutive units are grouped so that a shard has at most `shard_rows` rows, two neighbours together
have more, and none is empty. Where every row is labelled, shards end where row groups end, and a row group of more rows is
cut into equal parts. The key of a shard is the hash of what is asked (unit ids and rows), who is asked (the teacher's
fingerprint) and how the answer is stored (the label specification): a key that is committed is never asked again.

A worker takes a *task*: shards that lie in one row group, so that a large row group is decoded once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.row_reader import RowReader
from distilbeam.pipelines.score import picks_file
from distilbeam.pipelines.units import Unit
from distilbeam.teacher.inputs.columns import without_dictionaries
from distilbeam.teacher.softlabels import SoftLabelSpec, label_key

PICK_FIELDS = (pa.field("gain", pa.float32()), pa.field("inclusion_probability", pa.float32()))


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of what was chosen of a unit (of all its rows, when everything is labelled)."""

    unit: Unit
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    @property
    def begin(self) -> int:
        """Row of the pool at which it starts, when everything is labelled."""
        return self.unit.pool_row + self.start

    @property
    def end(self) -> int:
        """Row of the pool after its last, when everything is labelled."""
        return self.unit.pool_row + self.stop


@dataclass(frozen=True)
class Shard:
    """A shard to be labelled: its key, which names its file, and its parts in the pool's order."""

    key: str
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True)
class Task:
    """Shards that one worker labels one after the other."""

    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(shard.rows for shard in self.shards)


def plan_shards(units: Sequence[Unit], picks: str | None, shard_rows: int, spec: SoftLabelSpec) -> list[Task]:
    """Group the chosen rows of units into shards, and these into tasks.

    Args:
      units: the pool's units, in order.
      picks: directory of the picks, or None for every row.
      shard_rows: most rows in a shard.
      spec: the label specification, with the teacher's fingerprint.

    Returns:
      The tasks, in the pool's order.
    """
    if picks is None:
        return plan_pieces([piece for unit in units for piece in pieces(unit, shard_rows)], shard_rows, spec)
    chosen = [Part(unit, 0, count) for unit in units if (count := _count(unit, picks))]
    return _tasks([_keyed(parts, picks, spec) for parts in _cut(chosen, shard_rows)], picks)


def plan_pieces(wanted: Sequence[Part], shard_rows: int, spec: SoftLabelSpec) -> list[Task]:
    """Group whole pieces of units into shards, and these into tasks.

    Args:
      wanted: pieces, in the pool's order; where some are left out, a shard ends.
      shard_rows: most rows in a shard.
      spec: the label specification, with the teacher's fingerprint.

    Returns:
      The tasks, in the pool's order.
    """
    return _tasks([_keyed(parts, None, spec) for parts in _packed(wanted, shard_rows)], None)


def shard_key(parts: Sequence[tuple[str, bytes]], spec: SoftLabelSpec) -> str:
    """Hash what a shard is: the ids of its units with the rows of each, and the specification."""
    content = hashlib.blake2b(digest_size=16)
    for uid, rows in parts:
        content.update(uid.encode())
        content.update(rows)
    return label_key(content.hexdigest(), spec.teacher, spec)


def range_bytes(start: int, stop: int) -> bytes:
    """Describe a range of rows for `shard_key`."""
    return f"{start}-{stop}".encode()


def read_rows(reader: RowReader, part: Part, picks: str | None) -> Iterator[pa.Table]:
    """Read a part's rows, in row order, from only the row groups that hold some.

    Yields:
      Tables with the reader's columns, `pool_row` (int64, row of the whole pool), and, where the rows were chosen, `gain`
      and `inclusion_probability`.
    """
    chosen = _chosen(part, picks)
    rows = chosen["row"].to_numpy()
    for stored, which in reader.read(part.unit, rows):
        batch = without_dictionaries(stored)
        arrays = [*batch.columns, pa.array(rows[which] + part.unit.pool_row)]
        fields = [*batch.schema, pa.field("pool_row", pa.int64())]
        for field in PICK_FIELDS:
            if field.name in chosen.column_names:
                arrays.append(chosen[field.name].slice(which.start, len(batch)))
                fields.append(field)
        yield pa.table(arrays, schema=pa.schema(fields))


def pieces(unit: Unit, shard_rows: int) -> Iterator[Part]:
    """Cut a unit at the ends of its row groups, and a row group of more than `shard_rows` rows into equal parts."""
    first = 0
    for rows in unit.sizes:
        edges = np.linspace(first, first + rows, math.ceil(rows / shard_rows) + 1).astype(int).tolist()
        yield from (Part(unit, start, stop) for start, stop in pairwise(edges))
        first += rows


def _packed(wanted: Sequence[Part], shard_rows: int) -> Iterator[list[Part]]:
    """Put whole pieces that follow one another together as long as they fit."""
    parts: list[Part] = []
    for piece in wanted:
        full = sum(part.rows for part in parts) + piece.rows > shard_rows
        if parts and (full or parts[-1].end != piece.begin):
            yield parts
            parts = []
        if parts and parts[-1].unit == piece.unit:
            parts[-1] = Part(piece.unit, parts[-1].start, piece.stop)
        else:
            parts.append(piece)
    if parts:
        yield parts


def _cut(chosen: Sequence[Part], shard_rows: int) -> Iterator[list[Part]]:
    """Fill one shard after the other to the last row."""
    parts: list[Part] = []
    room = shard_rows
    for part in chosen:
        start = part.start
        while start < part.stop:
            stop = min(part.stop, start + room)
            parts.append(Part(part.unit, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield parts
                parts, room = [], shard_rows
    if parts:
        yield parts


def _tasks(shards: Sequence[Shard], picks: str | None) -> list[Task]:
    """Join neighbours of which one lies wholly in the row group that they share."""
    tasks: list[list[Shard]] = []
    last: tuple[str, int] | None = None
    alone_before = False
    for shard in shards:
        first_group, last_group = _group_at(shard.parts[0], picks, 0), _group_at(shard.parts[-1], picks, -1)
        alone = first_group == last_group
        if last == first_group and (alone or alone_before):
            tasks[-1].append(shard)
        else:
            tasks.append([shard])
        last, alone_before = last_group, alone
    return [Task(tuple(task)) for task in tasks]


def _group_at(part: Part, picks: str | None, end: int) -> tuple[str, int]:
    """Return the row group of a part's first (0) or last (-1) row."""
    if len(part.unit.sizes) == 1:
        return part.unit.uid, 0
    row = (part.start if end == 0 else part.stop - 1) if picks is None else _chosen(part, picks)["row"][end].as_py()
    return part.unit.uid, int(np.searchsorted(np.cumsum(part.unit.sizes), row, side="right"))


def _count(unit: Unit, picks: str) -> int:
    file = picks_file(picks, unit)
    return int(pq.read_metadata(file).num_rows) if file.exists() else 0


def _chosen(part: Part, picks: str | None) -> pa.Table:
    if picks is None:
        return pa.table({"row": np.arange(part.start, part.stop)})
    return pq.read_table(picks_file(picks, part.unit)).slice(part.start, part.stop - part.start)


def _keyed(parts: Sequence[Part], picks: str | None, spec: SoftLabelSpec) -> Shard:
    return Shard(shard_key([(part.unit.uid, _rows_of(part, picks)) for part in parts], spec), tuple(parts))


def _rows_of(part: Part, picks: str | None) -> bytes:
    if picks is None:
        return range_bytes(part.start, part.stop)
    rows: npt.NDArray[np.int64] = _chosen(part, picks)["row"].to_numpy()
    return rows.astype("<i8").tobytes()
