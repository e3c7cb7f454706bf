"""The rows of a shard: their places in it, their numbers in the pool, and where they lie in the pool's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.pipelines.labelling.dead_letters import runs
from distilbeam.pipelines.labelling.label_rows import ROW
from distilbeam.pipelines.labelling.reconcile import parts_of
from distilbeam.pipelines.labelling.saved_answers import Answered
from distilbeam.pipelines.labelling.shard_plan import Part, Shard
from distilbeam.pipelines.pool.row_ranges import to_ranges


def numbered(answered: Answered, shard: Shard) -> Answered:
    """Number rows by the pool as it is now: files may have come before theirs."""
    numbers = np.concatenate([part.unit.pool_row + part.numbers() for part in shard.parts])
    table = answered.table
    if table.num_rows:
        table = table.set_column(table.schema.get_field_index(ROW), ROW, pa.array(numbers[answered.places]))
    failures = [{**failure, ROW: int(numbers[failure["place"]])} for failure in answered.failures]
    return replace(answered, table=table, failures=failures)


def places_done(kept: Sequence[Answered], rows: int) -> npt.NDArray[np.bool_] | None:
    """Mark the rows of a shard that need not be read; None where that is none."""
    if not kept:
        return None
    done = np.zeros(rows, bool)
    for answered in kept:
        done[answered.places] = True
        done[[failure["place"] for failure in answered.failures]] = True
    return done


def parts_left(shard: Shard, done: npt.NDArray[np.bool_] | None) -> Iterator[tuple[Part, int]]:
    """List the pieces of a shard that are to be read, each with the place of its first row."""
    place = 0
    for part in shard.parts:
        if done is None:
            yield part, place
        else:
            for start, stop in runs(np.flatnonzero(~done[place : place + part.rows])):
                yield _piece(part, start, stop), place + start
        place += part.rows


def _piece(part: Part, start: int, stop: int) -> Part:
    """Cut rows out of a part, counted within it."""
    if part.ranges is None:
        return Part(part.unit, part.start + start, part.start + stop)
    rows = part.numbers()[start:stop]
    return Part(part.unit, int(rows[0]), int(rows[-1]) + 1, to_ranges(rows))


def located(failure: dict[str, Any], shard: Shard) -> dict[str, Any]:
    """Add the file and its row to a failure that knows the row of the pool."""
    failure = {name: value for name, value in failure.items() if name != "place"}
    row = failure[ROW]
    unit = next(p.unit for p in shard.parts if p.unit.pool_row <= row < p.unit.pool_row + p.unit.rows)
    return {**failure, "file": unit.path, "unit": unit.uid, "row": row - unit.pool_row + unit.first_row}


def parts_with_rows(shard: Shard, pool_rows: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Describe which rows of its parts a shard has, in the order of its rows."""
    edges = np.searchsorted(pool_rows, [[part.begin, part.end] for part in shard.parts])
    return parts_of(
        [
            (part.unit.uid, part.start, part.stop, pool_rows[first:stop] - part.unit.pool_row)
            for part, (first, stop) in zip(shard.parts, edges.tolist(), strict=True)
        ]
    )
