"""Copying answers: shards of rows whose question was answered before, made of their own ids and columns and of stored labels.

Answers of the same teacher in the same form are copied as they are stored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.labelling.label_rows import QUESTION, Labelling
from distilbeam.pipelines.labelling.matching import Matches
from distilbeam.pipelines.labelling.phase import Label
from distilbeam.pipelines.labelling.reconcile import Stored, parts_of
from distilbeam.pipelines.labelling.shard_plan import Bounds, Part, Shard, keyed, packed, read_rows
from distilbeam.pipelines.pool.row_ranges import to_ranges
from distilbeam.pipelines.pool.row_reader import RowReader
from distilbeam.storage.paths import readable
from distilbeam.teacher.softlabels import SoftLabelSpec, write_shard

_FORM = (
    "unit",
    "num_classes",
    "kind",
    "k",
    "classes",
    "temperature",
    "teacher",
    "sequence_length",
    "positions",
    "source",
)


@dataclass(frozen=True)
class Copy:
    """A shard whose answers are known.

    Attributes:
      shard: the shard.
      sources: the shards with the answers.
      source: int64 [rows], which of them has the answer to a row.
      row: int64 [rows], its row there.
      moved: rows that have left the pool and are taken over with their ids: ranges by the key of their shard.
    """

    shard: Shard
    sources: tuple[Stored, ...]
    source: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    moved: dict[str, list[int]]


def answers_fit(shard: Stored, spec: SoftLabelSpec) -> bool:
    """Tell whether the answers of a shard are what a specification says; its carried columns may be others."""
    return all(getattr(shard.entry.spec, name) == getattr(spec, name) for name in _FORM)


def plan_copies(
    copied: Sequence[Part],
    found: Matches,
    sources: Sequence[Stored],
    bounds: Bounds,
    spec: SoftLabelSpec,
) -> tuple[Copy, ...]:
    """Plan the shards of rows with a known answer.

    Args:
      copied: where these rows are.
      found: what was found for all rows that were looked up.
      sources: the shards that were searched.
      bounds: how large a shard may be.
      spec: the label specification.
    """
    number = np.flatnonzero(found.copied)  # of the rows that were looked up, in the pool's order
    copies: list[Copy] = []
    owner = np.full(len(found.copied), -1)
    first = 0
    for shard_parts in packed(copied, bounds, spec):
        shard = keyed(shard_parts, None, spec)
        here = number[first : first + shard.rows]
        first += shard.rows
        owner[here] = len(copies)
        used, source = np.unique(found.shard[here], return_inverse=True)
        copies.append(Copy(shard, tuple(sources[i] for i in used), source, found.row[here], {}))
    for stored, moved in zip(sources, found.moved, strict=True):
        rows = np.flatnonzero(moved >= 0)
        owners = owner[moved[rows]]
        for i in np.unique(owners[owners >= 0]).tolist():
            copies[i].moved[stored.entry.key] = list(to_ranges(rows[owners == i]))
    return tuple(copies)


def copy_answers(copies: Sequence[Copy], dataset: Path, work: Label) -> None:
    """Write and commit the shards of rows with a known answer."""
    reader = RowReader(work.columns, work.batch_rows)
    for copy in copies:
        start = time.perf_counter()
        rows = pa.concat_tables([table for part in copy.shard.parts for table in read_rows(reader, part, None)])
        table = _labelled(rows, copy, work.labelling)
        facts: dict[str, Any] = {"calls": 0, "requests": 0, "reused": table.num_rows, "failed": 0}
        facts["seconds"] = round(time.perf_counter() - start, 4)
        facts |= {"moved": copy.moved} if copy.moved else {}
        facts |= parts_of([(part.unit.uid, part.start, part.stop, part.numbers()) for part in copy.shard.parts])
        write_shard(dataset, copy.shard.key, table, work.labelling.spec, copy.shard.key, facts)


def _labelled(rows: pa.Table, copy: Copy, labelling: Labelling) -> pa.Table:
    """Put stored labels beside the ids and carried columns of rows."""
    spec = labelling.spec
    order = np.argsort(copy.source, kind="stable")
    borders = np.searchsorted(copy.source[order], np.arange(len(copy.sources) + 1))
    found = [
        _stored_labels(source.path, source.entry.checksum, source.entry.spec).take(
            pa.array(copy.row[order[first:stop]])
        )
        for source, first, stop in zip(copy.sources, borders[:-1], borders[1:], strict=True)
    ]
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    labels = pa.concat_tables(found, promote_options="permissive").take(pa.array(back))
    columns = {"example_id": labelling._ids(rows)}
    columns |= {name: rows[name] for name in spec.carried}
    columns |= {name: labels[name] for name in labels.column_names}
    columns |= labelling.question_column(rows)
    return pa.table(columns)


@lru_cache(maxsize=4)
def _stored_labels(path: Path, _checksum: str, spec: SoftLabelSpec) -> pa.Table:
    """Read the label columns of a shard."""
    file = pq.ParquetFile(readable(path))
    others = {"example_id", QUESTION, *spec.carried}
    return file.read([name for name in file.schema_arrow.names if name not in others])
