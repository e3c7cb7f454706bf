"""Put the rows of a window in their order: one pass over each column, from where it was read to where each row belongs.

A column of numbers lies in Arrow's memory as it was read. Its rows are moved as opaque values of a fixed size, which
costs what random writes cost. They go into tensors that batches are slices of; when the last batch is gone, their
memory is used again for a later window.

Rows of tens of kilobytes, such as the labels of a block of tokens, stay where they were read until their batch is made: a copy of
a single one is as fast as a copy of many, and another of the whole window would only take memory.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distilbeam.student.data.column_types import Array
from distilbeam.student.data.sampler import Rows

MOST_FREE = 32  # blocks of memory that are kept for later
WIDE_BYTES = 2**14  # of a row that is copied once, into its batch: a call for each costs little beside it


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
      tensors: by name, each with an entry per row; of the columns whose rows are not wide.
      wide: by name the other columns as they were read, an array of each unit's row group.
      unit: int64, the unit of each row, if there are wide columns.
      in_unit: int64, where each row is in the arrays of its unit.
      table: of the window's row groups, one after another, what the input is to be made of.
      in_table: int64, where each row is in `table`, if that has columns.
    """

    tensors: Mapping[str, Tensor]
    wide: Mapping[str, Sequence[Array]]
    unit: Rows
    in_unit: Rows
    table: pa.Table
    in_table: Rows

    def gather(self, name: str, rows: slice, out: Tensor) -> None:
        """Copy consecutive rows of a wide column, in this thread alone.

        Args:
          name: the column's.
          rows: which.
          out: a tensor for them, of a type that holds the column's numbers.
        """
        arrays, target = self.wide[name], out.numpy()
        for place, (unit, row) in enumerate(zip(self.unit[rows].tolist(), self.in_unit[rows].tolist(), strict=True)):
            np.copyto(target[place], arrays[unit][row])


class Memory:
    """Memory for tensors, used again when nothing refers to them any more.

    A window takes tens of megabytes, which the system would give out page by page every time anew.

    Args:
      pinned: whether it is page-locked, from which a GPU copies while the processor goes on; torch keeps that itself.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._free: list[Array] = []
        self._taking = Lock()

    def tensor(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Tensor:
        """Allocate a tensor, whose values are anything."""
        kind = torch.from_numpy(np.empty(0, dtype)).dtype
        size = math.prod(shape) * dtype.itemsize
        if self._pinned or not size:
            return torch.empty(*shape, dtype=kind, pin_memory=self._pinned)
        block = self._block(size)
        lease = block.view(_Lease)
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.from_numpy(lease)[:size].view(kind).view(*shape)  # its storage keeps the lease

    def _block(self, size: int) -> Array:
        with self._taking:  # others only append meanwhile
            fitting = next((i for i, block in enumerate(self._free) if size <= block.nbytes <= 2 * size), None)
            if fitting is not None:
                return self._free.pop(fitting)
            if len(self._free) >= MOST_FREE:
                self._free.pop(0)
        return np.empty(size, np.uint8)


class _Lease(np.ndarray[Any, Any]):
    """A view whose end is noticed."""


def shuffle(units: Sequence[UnitRows], places: Rows, count: int, memory: Memory) -> ShuffledColumns:
    """Copy rows to their places.

    Args:
      units: of a window.
      places: of the units' rows, one unit after another: distinct numbers below `count`, or -1 for a row that is
        not wanted.
      count: how many rows are wanted.
      memory: for them.
    """
    groups = list({id(unit.group): unit.group for unit in units}.values())
    offsets = dict(zip(map(id, groups), accumulate((g.rows for g in groups), initial=0), strict=False))
    likes = groups[0].arrays
    wide = {name: [unit.group.arrays[name] for unit in units] for name, like in likes.items() if _is_wide(like)}
    narrow = {name: like for name, like in likes.items() if name not in wide}
    tensors = {name: memory.tensor((count, *like.shape[1:]), like.dtype) for name, like in narrow.items()}
    in_table = np.empty(count if groups[0].table.num_columns else 0, np.int64)
    unit_of, in_unit = (np.empty(count if wide else 0, np.int64) for _ in range(2))
    first = 0
    for number, unit in enumerate(units):
        source, target = _moves(unit, places[first : first + len(unit)], all_wanted=count == len(places))
        for name, tensor in tensors.items():
            _put(tensor.numpy(), target, unit.group.arrays[name], source)
        rows = np.arange(len(unit)) if source is None else source
        if wide:
            unit_of[target], in_unit[target] = number, rows
        if len(in_table):
            in_table[target] = offsets[id(unit.group)] + rows
        first += len(unit)
    table = pa.concat_tables([group.table for group in groups], promote_options="permissive").combine_chunks()
    return ShuffledColumns(tensors, wide, unit_of, in_unit, table, in_table)


def _is_wide(array: Array) -> bool:
    return array.ndim > 1 and _row_bytes(array) >= WIDE_BYTES


def _row_bytes(array: Array) -> int:
    return array.dtype.itemsize * math.prod(array.shape[1:])


def _moves(unit: UnitRows, places: Rows, all_wanted: bool) -> tuple[Rows | None, Rows]:
    """Find which rows of a unit's group go where; None for all in their order."""
    if all_wanted:
        return unit.rows, places
    wanted = np.flatnonzero(places >= 0)
    return wanted if unit.rows is None else unit.rows[wanted], places[wanted]


def _put(out: Array, target: Rows, array: Array, source: Rows | None) -> None:
    """Copy rows to their places: numbers as such, longer rows as one opaque value each, which NumPy moves fastest."""
    row_bytes = _row_bytes(array)
    if array.ndim == 1:
        out[target] = array if source is None else array[source]
        return
    if not row_bytes:
        return
    opaque = np.ascontiguousarray(array).reshape(len(array), -1).view(f"V{row_bytes}").ravel()
    # every index is in range; any other mode than clip would copy once more
    moved = opaque if source is None else np.take(opaque, source, mode="clip")
    np.put(out.reshape(len(out), -1).view(f"V{row_bytes}").ravel(), target, moved, mode="clip")
