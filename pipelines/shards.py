"""Shards to be labelled: planned from what was chosen, before anything is asked.

Consecutive rows of consecutive units are grouped so that a shard has at most `shard_rows` rows and only the last of a
dataset can be small; none is empty. The key of a shard is the hash of what is asked (unit ids and rows), who is asked (the
teacher's fingerprint) and how the answer is stored (the label specification): a key that is committed is never asked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.score import picks_file
from distilbeam.pipelines.units import Unit, open_parquet, read_unit
from distilbeam.teacher.softlabels import SoftLabelSpec, label_key

PICK_FIELDS = (pa.field("gain", pa.float32()), pa.field("inclusion_probability", pa.float32()))


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` of what was chosen of a unit (of all its rows, when everything is labelled)."""

    unit: Unit
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """A shard to be labelled: its key, which names its file, and its parts in the pool's order."""

    key: str
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(part.stop - part.start for part in self.parts)


def plan_shards(units: Sequence[Unit], picks: str | None, shard_rows: int, spec: SoftLabelSpec) -> list[Shard]:
    """Group the chosen rows of units into shards.

    Args:
      units: the pool's units, in order.
      picks: directory of the picks, or None for every row.
      shard_rows: most rows in a shard.
      spec: the label specification, with the teacher's fingerprint.

    Returns:
      The shards, in the pool's order.
    """
    shards: list[Shard] = []
    parts: list[Part] = []
    room = shard_rows
    for unit in units:
        count, start = _count(unit, picks), 0
        while start < count:
            stop = min(count, start + room)
            parts.append(Part(unit, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                shards.append(_keyed(parts, picks, spec))
                parts, room = [], shard_rows
    return [*shards, _keyed(parts, picks, spec)] if parts else shards


def read_rows(part: Part, columns: Sequence[str], picks: str | None, batch_rows: int) -> Iterator[pa.Table]:
    """Read a part's rows, in row order, from only the row groups that hold some.

    Yields:
      Tables of at most `batch_rows` rows with `columns`, `pool_row` (int64, row of the whole pool), and, where the rows
      were chosen, `gain` and `inclusion_probability`.
    """
    chosen = _chosen(part, picks)
    rows = chosen["row"].to_numpy()
    first = 0
    groups = _groups(part.unit, rows)
    for group, group_first in groups:
        first = group_first
        for batch in read_unit(part.unit, columns, batch_rows, [group]):
            lo, hi = np.searchsorted(rows, [first, first + batch.num_rows])
            if hi > lo:
                yield _with_picks(batch.take(pa.array(rows[lo:hi] - first)), chosen.slice(lo, hi - lo), part.unit)
            first += batch.num_rows


def _with_picks(batch: pa.RecordBatch, chosen: pa.Table, unit: Unit) -> pa.Table:
    table = pa.Table.from_batches([batch])
    table = table.append_column("pool_row", pa.array(chosen["row"].to_numpy() + unit.pool_row))
    for field in PICK_FIELDS:
        if field.name in chosen.column_names:
            table = table.append_column(field, chosen[field.name])
    return table


def _groups(unit: Unit, rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    metadata = open_parquet(unit.path).metadata
    first = 0
    for group in range(*unit.row_groups):
        count = metadata.row_group(group).num_rows
        lo, hi = np.searchsorted(rows, [first, first + count])
        if hi > lo:
            yield group, first
        first += count


def _count(unit: Unit, picks: str | None) -> int:
    if picks is None:
        return unit.rows
    file = picks_file(picks, unit)
    return int(pq.read_metadata(file).num_rows) if file.exists() else 0


def _chosen(part: Part, picks: str | None) -> pa.Table:
    if picks is None:
        return pa.table({"row": np.arange(part.start, part.stop)})
    return pq.read_table(picks_file(picks, part.unit)).slice(part.start, part.stop - part.start)


def _keyed(parts: Sequence[Part], picks: str | None, spec: SoftLabelSpec) -> Shard:
    content = hashlib.blake2b(digest_size=16)
    for part in parts:
        content.update(part.unit.uid.encode())
        content.update(_chosen(part, picks)["row"].to_numpy().astype("<i8").tobytes())
    return Shard(label_key(content.hexdigest(), spec.teacher, spec), tuple(parts))
