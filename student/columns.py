"""Read row groups of soft labels as columns, and take rows out of them into tensors.

What is a number in Parquet is an array as soon as it is read, without a copy where Arrow's memory has the right type.
Everything else (images, text) stays as it was stored until its rows are wanted, so that a rank decodes its own rows
only, and a window of images takes the memory of their files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distilbeam.student.column_types import Array, is_carried_tensor, is_number, lists, numbers
from distilbeam.student.input_maker import InputMaker
from distilbeam.student.row_groups import RowGroup
from distilbeam.student.shuffling import GroupColumns, ShuffledColumns
from distilbeam.teacher.softlabels import SoftLabelSpec, decode
from distilbeam.teacher.softlabels.columns import CLASSES, LOGPROBS, TAIL

Batch = dict[str, Tensor]
INPUTS, ROW = "inputs", "row"
INDEX = np.dtype(np.int64)  # what torch gathers by


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

    def scan(self, group: RowGroup) -> pa.Table:
        """Read a row group's columns."""
        return group.read(self.schema.names)

    def columns(self, group: RowGroup, table: pa.Table) -> GroupColumns:
        """Make a row group's table into arrays, and its input too where that is no larger than what is stored."""
        arrays = {f.name: numbers(table[f.name], f) for f in self.schema if is_number(f.type)}
        if self.maker is None:
            arrays |= {f.name: lists(table[f.name], f) for f in self.schema if is_carried_tensor(f)}
        labels = decode(table, self.spec)
        arrays[LOGPROBS] = labels.logprobs
        if labels.classes is not None:
            arrays[CLASSES] = labels.classes
        if labels.tail_logmass is not None:
            arrays[TAIL] = labels.tail_logmass
        arrays[ROW] = np.arange(group.first_row, group.first_row + table.num_rows)
        if self.maker is None:
            return GroupColumns(table.num_rows, arrays, table.select([]))
        stored = table.select([name for name in self.maker.config.columns if name in self.schema.names])
        if not self.maker.early:
            return GroupColumns(table.num_rows, arrays, stored)
        arrays[INPUTS] = self.maker.view(stored)
        return GroupColumns(table.num_rows, arrays, stored.select([]))

    def take(self, shuffled: ShuffledColumns, rows: slice) -> Batch:
        """Copy consecutive rows into tensors, and make their input."""
        batch = {
            name: self._copied(array[rows], INDEX if name == CLASSES else None)
            for name, array in shuffled.arrays.items()
        }
        if self.maker is not None and INPUTS not in batch:
            wanted = shuffled.in_table[rows]
            batch[INPUTS] = self._fresh((len(wanted), *self.maker.shape), self.maker.dtype)
            self.maker.fill(batch[INPUTS].numpy(), shuffled.table.take(pa.array(wanted)))
        return batch

    def whole(self, group: RowGroup, table: pa.Table) -> GroupColumns:
        """Make a row group's table into arrays, its input among them."""
        columns = self.columns(group, table)
        rows = np.arange(table.num_rows)
        everything = self.take(ShuffledColumns(columns.arrays, columns.table, rows), slice(0, len(rows)))
        return GroupColumns(len(rows), {name: value.numpy() for name, value in everything.items()}, table.select([]))

    def first(self, group: RowGroup) -> Batch:
        """Read the first row of a row group."""
        found = self.whole(group, pa.Table.from_batches([group.first(self.schema.names)]))
        return {name: torch.from_numpy(values) for name, values in found.arrays.items()}

    def _copied(self, array: Array, dtype: np.dtype[Any] | None) -> Tensor:
        copy = self._fresh(array.shape, dtype or array.dtype)
        np.copyto(copy.numpy(), array)
        return copy

    def _fresh(self, shape: Sequence[int], dtype: np.dtype[Any]) -> Tensor:
        """Allocate a tensor: of Arrow's memory, which is reused, while new pages of the system's are slow to touch."""
        if self.pinned:
            return torch.empty(*shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=True)
        count = math.prod(shape)
        memory = pa.allocate_buffer(max(1, count) * dtype.itemsize)
        return torch.from_numpy(np.frombuffer(memory, dtype, count).reshape(tuple(shape)))
