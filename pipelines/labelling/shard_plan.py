"""Shards to be labelled: planned from what was chosen, before anything is asked.

Consecutive rows of consecutive units are grouped so that a shard has at most `shard_rows` rows and about `shard_bytes` bytes,
two neighbours together have more, and none is empty. Where every row is labelled, shards end where row groups end, and a row group of more rows is
cut into equal parts. The key of a shard is the hash of what is asked (unit ids and rows), who is asked (the teacher's
fingerprint) and how the answer is stored (the label specification): a key that is committed is never asked again.

A worker takes a *task*: shards that lie in one row group, so that a large row group is decoded once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.inputs.columns import without_dictionaries
from distilbeam.pipelines.acquisition.score import picks_file
from distilbeam.pipelines.pool.row_ranges import count, from_ranges, to_ranges
from distilbeam.pipelines.pool.row_reader import RowReader
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.teacher.softlabels import SoftLabelSpec, label_key

PICK_FIELDS = (pa.field("gain", pa.float32()), pa.field("inclusion_probability", pa.float32()))


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of what was chosen of a unit (of all its rows, when everything is labelled).

    Where some of all rows are left out, because they have a label, `ranges` are the others (see `row_ranges`).
    """

    unit: Unit
    start: int
    stop: int
    ranges: tuple[int, ...] | None = None

    @cached_property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start if self.ranges is None else count(self.ranges)

    def numbers(self) -> npt.NDArray[np.int64]:
        """List its rows of the unit, when everything is labelled."""
        return np.arange(self.start, self.stop) if self.ranges is None else from_ranges(self.ranges)

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

    @cached_property
    def rows(self) -> int:
        """Number of rows."""
        return sum(part.rows for part in self.parts)


@dataclass(frozen=True)
class Task:
    """Shards that one worker labels one after the other."""

    shards: tuple[Shard, ...]

    @cached_property
    def rows(self) -> int:
        """Number of rows."""
        return sum(shard.rows for shard in self.shards)


@dataclass(frozen=True)
class Bounds:
    """How large a shard may be: rows, and bytes of what is stored of them; a row alone may have more."""

    rows: int
    bytes: int | None = None

    def rows_of(self, unit: Unit, spec: SoftLabelSpec) -> int:
        """Return how many rows of a unit fit into one shard."""
        return self.rows if self.bytes is None else max(1, min(self.rows, self.bytes // stored_bytes(unit, spec)))


def stored_bytes(unit: Unit, spec: SoftLabelSpec) -> int:
    """Estimate the bytes that a labelled row of a unit takes: its carried columns, by the pool's footers, and its label."""
    carried = sum(size for name, size in unit.widths if name in spec.carried)
    return carried + spec.label_bytes


def plan_shards(
    units: Sequence[Unit], picks: str | None, shard_rows: int, spec: SoftLabelSpec, shard_bytes: int | None = None
) -> list[Task]:
    """Group the chosen rows of units into shards, and these into tasks.

    Args:
      units: the pool's units, in order.
      picks: directory of the picks, or None for every row.
      shard_rows: most rows in a shard.
      spec: the label specification, with the teacher's fingerprint.
      shard_bytes: most bytes that are stored in a shard.

    Returns:
      The tasks, in the pool's order.
    """
    bounds = Bounds(shard_rows, shard_bytes)
    if picks is None:
        return plan_pieces(
            [piece for unit in units for piece in pieces(unit, bounds.rows_of(unit, spec))], bounds, spec
        )
    chosen = [Part(unit, 0, rows) for unit in units if (rows := _count(unit, picks))]
    return _tasks([keyed(parts, picks, spec) for parts in _cut(chosen, bounds, spec)], picks)


def plan_pieces(wanted: Sequence[Part], bounds: Bounds, spec: SoftLabelSpec) -> list[Task]:
    """Group whole pieces of units into shards, and these into tasks.

    Args:
      wanted: pieces, in the pool's order; where whole ones are left out, a shard ends.
      bounds: how large a shard may be.
      spec: the label specification, with the teacher's fingerprint.

    Returns:
      The tasks, in the pool's order.
    """
    return _tasks([keyed(parts, None, spec) for parts in packed(wanted, bounds, spec)], None)


def shard_key(parts: Sequence[tuple[str, bytes]], spec: SoftLabelSpec) -> str:
    """Hash what a shard is: the ids of its units with the rows of each, and the specification."""
    # Of what is asked, never of the dataset that it goes to or of who works on it: two plans that ask the same rows of the same teacher
    # have the same keys, so that a retry, another runner or a job that goes on finds what is committed.
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
        # equal parts: a row group just above the bound would leave a shard of a few rows, with a footer and a commit of its own
        edges = np.linspace(first, first + rows, math.ceil(rows / shard_rows) + 1).astype(int).tolist()
        yield from (Part(unit, start, stop) for start, stop in pairwise(edges))
        first += rows


def packed(wanted: Sequence[Part], bounds: Bounds, spec: SoftLabelSpec) -> Iterator[list[Part]]:
    """Put whole pieces that follow one another together as long as they fit; pieces with gaps need not follow."""
    parts: list[Part] = []
    rows = size = 0
    for piece in wanted:
        piece_bytes = piece.rows * stored_bytes(piece.unit, spec) if bounds.bytes is not None else 0
        full = rows + piece.rows > bounds.rows or size + piece_bytes > (bounds.bytes or 0)
        if parts and (full or not _follows(parts[-1], piece)):
            yield parts
            parts, rows, size = [], 0, 0
        if (
            parts and parts[-1].unit == piece.unit
        ):  # one range, as if it had never been cut: the key is of the rows alone
            parts[-1] = _joined(parts[-1], piece)
        else:
            parts.append(piece)
        rows, size = rows + piece.rows, size + piece_bytes
    if parts:
        yield parts


def _follows(one: Part, two: Part) -> bool:
    return one.end == two.begin or one.ranges is not None or two.ranges is not None


def _joined(one: Part, two: Part) -> Part:
    """Join two pieces of a unit."""
    if one.ranges is None and two.ranges is None and one.stop == two.start:
        return Part(one.unit, one.start, two.stop)
    return Part(one.unit, one.start, two.stop, to_ranges(np.concatenate([one.numbers(), two.numbers()])))


def _cut(chosen: Sequence[Part], bounds: Bounds, spec: SoftLabelSpec) -> Iterator[list[Part]]:
    """Fill one shard after the other to the last row."""
    # Chosen rows are few of each row group, so that shards that end with row groups would be tiny: here a shard ends where it
    # is full, in the middle of a unit too, and `_tasks` sees to it that its row group is decoded once all the same.
    parts: list[Part] = []
    room, left = bounds.rows, bounds.bytes or 0
    for part in chosen:
        row_bytes = stored_bytes(part.unit, spec) if bounds.bytes is not None else 0
        start = part.start
        while start < part.stop:
            fits = left // row_bytes if row_bytes else room
            if (
                fits == 0 and parts
            ):  # a row that is larger than a whole shard gets one of its own, see max(1, ...) below
                yield parts
                parts, room, left = [], bounds.rows, bounds.bytes or 0
                continue
            stop = min(part.stop, start + min(room, max(1, fits)))
            parts.append(Part(part.unit, start, stop))
            room, left = room - (stop - start), max(0, left - row_bytes * (stop - start))
            start = stop
            if room == 0:
                yield parts
                parts, room, left = [], bounds.rows, bounds.bytes or 0
    if parts:
        yield parts


def _tasks(shards: Sequence[Shard], picks: str | None) -> list[Task]:
    """Join neighbours of which one lies wholly in the row group that they share."""
    # A worker that takes both neighbours decodes the row group that they share once. Chains are kept short: a shard that spans
    # several row groups joins a neighbour only where that one lies in a single row group; otherwise everything that is planned
    # would hang together in one task, which one worker does alone.
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
    row = int(part.numbers()[end]) if picks is None else _chosen(part, picks)["row"][end].as_py()
    return part.unit.uid, int(np.searchsorted(np.cumsum(part.unit.sizes), row, side="right"))


def _count(unit: Unit, picks: str) -> int:
    file = picks_file(picks, unit)
    return int(pq.read_metadata(file).num_rows) if file.exists() else 0


def _chosen(part: Part, picks: str | None) -> pa.Table:
    if picks is None:
        return pa.table({"row": part.numbers()})
    return pq.read_table(picks_file(picks, part.unit)).slice(part.start, part.stop - part.start)


def keyed(parts: Sequence[Part], picks: str | None, spec: SoftLabelSpec) -> Shard:
    """Make a shard of its parts."""
    return Shard(shard_key([(part.unit.uid, _rows_of(part, picks)) for part in parts], spec), tuple(parts))


def _rows_of(part: Part, picks: str | None) -> bytes:
    if picks is None:
        return range_bytes(part.start, part.stop) if part.ranges is None else str(part.ranges).encode()
    rows: npt.NDArray[np.int64] = _chosen(part, picks)["row"].to_numpy()
    return rows.astype("<i8").tobytes()
