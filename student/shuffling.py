"""Put the rows of a window in their order: one pass over each column, from where it was read to where each row belongs.

A column of numbers lies in Arrow's memory as it was read. Its rows are moved as opaque values of a fixed size, which
costs what random writes cost; the memory that they go to is used again for later windows.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import pyarrow as pa

from distilbeam.student.column_types import Array
from distilbeam.student.order import Rows


@dataclass(frozen=True)
class GroupColumns:
    """The columns of a row group.

    Attributes:
      rows: how many rows it has.
      arrays: by name, each with an entry per row.
      table: what the input is still to be made of; without columns where there is nothing to make.
    """

    rows: int
    arrays: Mapping[str, Array]
    table: pa.Table


@dataclass(frozen=True)
class UnitRows:
    """A unit of the order: a row group, and which of its rows as indices; None for all in their order."""

    group: GroupColumns
    rows: Rows | None

    def __len__(self) -> int:
        return self.group.rows if self.rows is None else len(self.rows)


@dataclass(frozen=True)
class ShuffledColumns:
    """Rows of a window in the order of their visit.

    Attributes:
      arrays: by name, each with an entry per row; their memory is used again when this object is gone.
      table: of the window's row groups, one after another, what the input is to be made of.
      in_table: int64, where each row is in `table`, if that has columns.
    """

    arrays: Mapping[str, Array]
    table: pa.Table
    in_table: Rows


class Scratch:
    """Memory for the arrays of windows, used again when their window is done with.

    A window takes tens of megabytes, which the system would give out page by page every time anew.
    """

    def __init__(self) -> None:
        self._free: list[Array] = []

    def arrays(self, like: Mapping[str, Array], rows: int) -> tuple[dict[str, Array], list[Array]]:
        """Give arrays of some rows, of the types of others, and the memory that they lie in."""
        arrays, memory = {}, []
        for name, array in like.items():
            shape = (rows, *array.shape[1:])
            needed = math.prod(shape) * array.dtype.itemsize
            memory.append(self._at_least(needed))
            arrays[name] = memory[-1][:needed].view(array.dtype).reshape(shape)
        return arrays, memory

    def give_back(self, memory: list[Array]) -> None:
        """Take memory back for other windows."""
        self._free += memory

    def _at_least(self, needed: int) -> Array:
        fitting = [i for i, memory in enumerate(self._free) if needed <= memory.nbytes <= 2 * needed]
        return self._free.pop(fitting[0]) if fitting else np.empty(needed, np.uint8)


def shuffle(units: Sequence[UnitRows], places: Rows, count: int, scratch: Scratch) -> ShuffledColumns:
    """Copy rows to their places.

    Args:
      units: of a window.
      places: of the units' rows, one unit after another: distinct numbers below `count`, or -1 for a row that is
        not wanted.
      count: how many rows are wanted.
      scratch: memory for them.
    """
    groups = list({id(unit.group): unit.group for unit in units}.values())
    offsets = dict(zip(map(id, groups), accumulate((g.rows for g in groups), initial=0), strict=False))
    arrays, memory = scratch.arrays(groups[0].arrays, count)
    in_table = np.empty(count if groups[0].table.num_columns else 0, np.int64)
    first = 0
    for unit in units:
        source, target = _moves(unit, places[first : first + len(unit)], all_wanted=count == len(places))
        for name, array in arrays.items():
            _scatter(array, target, unit.group.arrays[name], source)
        if len(in_table):
            in_table[target] = offsets[id(unit.group)] + (np.arange(len(unit)) if source is None else source)
        first += len(unit)
    table = pa.concat_tables([group.table for group in groups], promote_options="permissive").combine_chunks()
    shuffled = ShuffledColumns(arrays, table, in_table)
    weakref.finalize(shuffled, scratch.give_back, memory)
    return shuffled


def _moves(unit: UnitRows, places: Rows, all_wanted: bool) -> tuple[Rows | None, Rows]:
    """Find which rows of a unit's group go where; None for all in their order."""
    if all_wanted:
        return unit.rows, places
    wanted = np.flatnonzero(places >= 0)
    return wanted if unit.rows is None else unit.rows[wanted], places[wanted]


def _scatter(out: Array, target: Rows, array: Array, source: Rows | None) -> None:
    """Copy rows to their places, each as one opaque value, which NumPy moves fastest."""
    row_bytes = array.dtype.itemsize * math.prod(array.shape[1:])
    if not row_bytes:
        return
    assert array.dtype == out.dtype
    opaque = np.ascontiguousarray(array).reshape(len(array), -1).view(f"V{row_bytes}").ravel()
    # every index is in range; any other mode than clip would copy once more
    moved = opaque if source is None else np.take(opaque, source, mode="clip")
    np.put(out.reshape(len(out), -1).view(f"V{row_bytes}").ravel(), target, moved, mode="clip")
