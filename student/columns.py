"""Columns of soft labels as arrays from which rows are taken into tensors.

What is a number in Parquet is an array as soon as it is read, without a copy where Arrow's memory has the right type.
Everything else (images, text) stays as it was stored until its rows are wanted, so that a rank decodes its own rows
only, and a window of images takes the memory of their files.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from distilbeam.student.order import Rows
from distilbeam.student.row_groups import RowGroup
from distilbeam.teacher.preprocess import InputConfig, InputError, MakeInput, make_input
from distilbeam.teacher.softlabels import SoftLabelSpec, decode
from distilbeam.teacher.softlabels.columns import CLASSES, LOGPROBS, TAIL

Batch = dict[str, Tensor]
Array = npt.NDArray[Any]
INPUTS, ROW = "inputs", "row"
INDEX = np.dtype(np.int64)  # what torch gathers by
WIDER = {np.dtype(name): np.dtype(np.int64) for name in ("uint16", "uint32", "uint64")}  # torch cannot index by these


@dataclass(frozen=True)
class InputMaker:
    """Makes the student's input of Arrow columns.

    Attributes:
      config: which columns, and how.
      make: what `make_input` returned.
      shape: shape of one row's input.
      dtype: type of its numbers.
      early: whether it takes no work and no more memory than what is stored, so that whole row groups are made.
    """

    config: InputConfig
    make: MakeInput
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    early: bool

    @classmethod
    def of(cls, config: InputConfig, group: RowGroup) -> InputMaker:
        """Make one whose shape is that of a row group's first row.

        Raises:
          ValueError: the input cannot be made, or is not one array of numbers.
        """
        make = make_input(config)
        wanted = [name for name in config.columns if name in group.file.schema.names]
        stored = group.first(wanted)
        made = make(stored)
        if not isinstance(made, np.ndarray) or made.dtype.kind not in "fiub":
            raise InputError(f"input of kind {config.kind!r} must be one array of numbers for a student")
        early = config.kind == "tensor" and made.nbytes <= stored.nbytes
        return cls(config, make, made.shape[1:], made.dtype, early)

    def view(self, table: pa.Table) -> Array:
        """Make the input of a table's rows, without a copy where they are stored as they are needed."""
        batches = table.combine_chunks().to_batches()
        if len(batches) == 1:
            return self._made(batches[0])
        out = np.empty((table.num_rows, *self.shape), self.dtype)
        self.fill(out, table)
        return out

    def fill(self, out: Array, table: pa.Table) -> None:
        """Make the input of a table's rows.

        Raises:
          InputError: a row's input has another shape than the first row's.
        """
        start = 0
        for batch in table.combine_chunks().to_batches():
            made = self._made(batch)
            out[start : start + len(made)] = made
            start += len(made)

    def _made(self, batch: pa.RecordBatch) -> Array:
        made: Array = self.make(batch)
        if made.shape[1:] != self.shape:
            raise InputError(
                f"inputs of all rows must have the shape {list(self.shape)} of the first, got {list(made.shape[1:])}"
            )
        return made


@dataclass(frozen=True)
class GroupColumns:
    """The columns of a row group.

    Attributes:
      arrays: by name, each with an entry per row.
      table: what the input is still to be made of; without columns where there is nothing to make.
    """

    arrays: Mapping[str, Array]
    table: pa.Table


@dataclass(frozen=True)
class UnitRows:
    """A unit of the order: a row group, and which of its rows as indices; None for all in their order."""

    group: GroupColumns
    rows: Rows | None

    def __len__(self) -> int:
        return len(self.group.arrays[ROW]) if self.rows is None else len(self.rows)


@dataclass(frozen=True)
class ShuffledColumns:
    """The rank's rows of a window in the order of their visit.

    Attributes:
      arrays: by name, each with an entry per row.
      table: of the window's row groups, one after another, what the input is to be made of.
      in_table: int64, where each row is in `table`, if that has columns.
      reader: who read them.
    """

    arrays: Mapping[str, Array]
    table: pa.Table
    in_table: Rows
    reader: ColumnReader

    def take(self, rows: slice) -> Batch:
        """Copy consecutive rows into tensors, and make their input."""
        batch = {
            name: self._copied(array[rows], INDEX if name == CLASSES else None) for name, array in self.arrays.items()
        }
        maker = self.reader.maker
        if maker is not None and INPUTS not in batch:
            wanted = self.in_table[rows]
            batch[INPUTS] = self.reader.fresh((len(wanted), *maker.shape), maker.dtype)
            maker.fill(batch[INPUTS].numpy(), self.table.take(pa.array(wanted)))
        return batch

    def _copied(self, array: Array, dtype: np.dtype[Any] | None) -> Tensor:
        copy = self.reader.fresh(array.shape, dtype or array.dtype)
        np.copyto(copy.numpy(), array)
        return copy


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


@dataclass(frozen=True)
class ColumnReader:
    """Reads row groups.

    Attributes:
      spec: of the soft labels.
      schema: columns to read, with types that hold their numbers in every file.
      maker: makes the student's input, or None for every carried column that is a tensor.
      pinned: whether tensors are made in page-locked memory, from which a GPU copies while the processor goes on.
    """

    spec: SoftLabelSpec
    schema: pa.Schema
    maker: InputMaker | None
    pinned: bool
    scratch: Scratch = field(default_factory=Scratch, repr=False)

    def scan(self, group: RowGroup) -> pa.Table:
        """Read a row group's columns."""
        return group.read(self.schema.names)

    def columns(self, group: RowGroup, table: pa.Table) -> GroupColumns:
        """Make a row group's table into arrays, and its input too where that is no larger than what is stored."""
        arrays = {f.name: _numbers(table[f.name], f) for f in self.schema if is_number(f.type)}
        if self.maker is None:
            arrays |= {f.name: _lists(table[f.name], f) for f in self.schema if is_carried_tensor(f)}
        labels = decode(table, self.spec)
        arrays[LOGPROBS] = labels.logprobs
        if labels.classes is not None:
            arrays[CLASSES] = labels.classes
        if labels.tail_logmass is not None:
            arrays[TAIL] = labels.tail_logmass
        arrays[ROW] = np.arange(group.first_row, group.first_row + table.num_rows)
        if self.maker is None:
            return GroupColumns(arrays, table.select([]))
        stored = table.select([name for name in self.maker.config.columns if name in self.schema.names])
        if not self.maker.early:
            return GroupColumns(arrays, stored)
        arrays[INPUTS] = self.maker.view(stored)
        return GroupColumns(arrays, stored.select([]))

    def whole(self, group: RowGroup, table: pa.Table) -> GroupColumns:
        """Make a row group's table into arrays, its input among them."""
        columns = self.columns(group, table)
        rows = np.arange(table.num_rows)
        everything = self.shuffle([UnitRows(columns, None)], rows, len(rows)).take(slice(0, len(rows)))
        return GroupColumns({name: value.numpy() for name, value in everything.items()}, table.select([]))

    def first(self, group: RowGroup) -> Batch:
        """Read the first row of a row group."""
        found = self.whole(group, pa.Table.from_batches([group.first(self.schema.names)]))
        return {name: torch.from_numpy(values) for name, values in found.arrays.items()}

    def shuffle(self, units: Sequence[UnitRows], places: Rows, count: int) -> ShuffledColumns:
        """Copy rows to their places.

        Args:
          units: of a window.
          places: of the units' rows, one unit after another: distinct numbers below `count`, or -1 for a row that is
            not wanted.
          count: how many rows are wanted.
        """
        groups = list({id(unit.group): unit.group for unit in units}.values())
        offsets = dict(zip(map(id, groups), accumulate((len(g.arrays[ROW]) for g in groups), initial=0), strict=False))
        arrays, memory = self.scratch.arrays(groups[0].arrays, count)
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
        shuffled = ShuffledColumns(arrays, table, in_table, self)
        weakref.finalize(shuffled, self.scratch.give_back, memory)
        return shuffled

    def fresh(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Tensor:
        """Allocate a tensor: of Arrow's memory, which is reused, while new pages of the system's are slow to touch."""
        if self.pinned:
            return torch.empty(*shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
        count = math.prod(shape)
        memory = pa.allocate_buffer(max(1, count) * dtype.itemsize)
        return torch.from_numpy(np.frombuffer(memory, dtype, count).reshape(tuple(shape)))


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


def is_number(kind: pa.DataType) -> bool:
    """Tell whether a column of this type is a tensor of one number per row."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def is_carried_tensor(field: pa.Field) -> bool:
    """Tell whether a column holds lists of numbers of one length that are no labels."""
    lists = pa.types.is_fixed_size_list(field.type) and is_number(field.type.value_type)
    return bool(lists and not field.name.startswith("teacher_"))


def _numbers(column: pa.ChunkedArray, field: pa.Field) -> Array:
    """View a column as an array; missing values are NaN."""
    if column.null_count and pa.types.is_integer(field.type):
        raise ValueError(
            f"column {field.name} of whole numbers must not have missing values, got {column.null_count:,}; name the "
            "columns that you need in `columns`"
        )
    return _as_tensors_hold(_joined(column).to_numpy(zero_copy_only=False), field.type)


def _lists(column: pa.ChunkedArray, field: pa.Field) -> Array:
    joined, width = _joined(column), field.type.list_size
    values = joined.flatten()
    if joined.null_count or values.null_count or len(values) != len(joined) * width:
        raise ValueError(f"column {field.name} must not have missing values in its lists; fill them before labelling")
    return _as_tensors_hold(values.to_numpy(zero_copy_only=False).reshape(len(joined), width), field.type.value_type)


def _as_tensors_hold(array: Array, type_: pa.DataType) -> Array:
    dtype = np.dtype(type_.to_pandas_dtype())
    return array.astype(WIDER.get(dtype, dtype), copy=False)


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """Join the chunks of a column; one chunk is not copied."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
