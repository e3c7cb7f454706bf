"""Read row groups of soft labels as columns, and take rows out of them into tensors.

What is a number in Parquet is an array as soon as it is read, without a copy where Arrow's memory has the right type.
Everything else (images, text) stays as it was stored until its rows are wanted, so that a rank decodes its own rows
only, and a window of images takes the memory of their files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distilbeam.inputs.config import InputError
from distilbeam.student.data.bad_rows import BadRowError, first_without_input
from distilbeam.student.data.column_types import Array, is_carried_tensor, is_number, lists, numbers
from distilbeam.student.data.input_maker import InputMaker
from distilbeam.student.data.row_groups import RowGroup
from distilbeam.student.data.shuffle import GroupColumns, Memory, ShuffledColumns
from distilbeam.teacher.softlabels import SoftLabelSpec, decode, decode_tokens
from distilbeam.teacher.softlabels.columns import CLASSES, LOGPROBS, TAIL, TOKEN_LOGPROB

Batch = dict[str, Tensor]
INPUTS, ROW = "inputs", "row"
INDEX = np.dtype(np.int64)  # what torch gathers by; classes are stored and moved in half of it


@dataclass(frozen=True)
class ColumnReader:
    """Reads row groups.

    Attributes:
      spec: of the soft labels.
      schema: columns to read, with types that hold their numbers in every file.
      maker: makes the student's input, or None for every carried column that is a tensor.
      memory: for inputs.
    """

    spec: SoftLabelSpec
    schema: pa.Schema
    maker: InputMaker | None
    memory: Memory

    def scan(self, group: RowGroup) -> pa.Table:
        """Read a row group's columns."""
        return group.read(self.schema.names)

    def columns(self, group: RowGroup, table: pa.Table) -> GroupColumns:
        """Make a row group's table into arrays, and its input too where that is no larger than what is stored."""
        arrays = {f.name: numbers(table[f.name], f) for f in self.schema if is_number(f.type)}
        if self.maker is None:
            arrays |= {f.name: lists(table[f.name], f) for f in self.schema if is_carried_tensor(f)}
        arrays |= _label_arrays(table, self.spec)
        arrays[ROW] = np.arange(group.first_row, group.first_row + table.num_rows)
        if self.maker is None:
            return GroupColumns(table.num_rows, arrays, table.select([]))
        stored = table.select([name for name in self.maker.config.columns if name in self.schema.names])
        if not self.maker.early:
            return GroupColumns(table.num_rows, arrays, stored)
        arrays[INPUTS] = self.maker.view(stored)
        return GroupColumns(table.num_rows, arrays, stored.select([]))

    def take(self, shuffled: ShuffledColumns, rows: slice) -> Batch:
        """Give consecutive rows, and make their input; no other rows share their memory."""
        batch = {name: values[rows] for name, values in shuffled.tensors.items()}
        for name, (like, *_) in shuffled.wide.items():
            shape = (len(shuffled.unit[rows]), *like.shape[1:])
            batch[name] = self.memory.tensor(shape, INDEX if name == CLASSES else like.dtype)
            shuffled.gather(name, rows, batch[name])
        if CLASSES in shuffled.tensors:
            narrow = batch[CLASSES]
            batch[CLASSES] = self.memory.tensor(narrow.shape, INDEX)
            np.copyto(batch[CLASSES].numpy(), narrow.numpy())  # in this thread alone, as torch would not
        if self.maker is not None and INPUTS not in batch:
            table = shuffled.table.take(pa.array(shuffled.in_table[rows]))
            try:
                batch[INPUTS] = self._made(table)
            except InputError as e:
                bad = first_without_input(self.maker.made, table)
                raise e if bad is None else BadRowError(int(batch[ROW][bad.row]), str(bad)) from e
        return batch

    def whole(self, group: RowGroup, table: pa.Table) -> GroupColumns:
        """Make a row group's table into arrays of their own, its input among them."""
        columns = self.columns(group, table)
        arrays = {name: array.copy() for name, array in columns.arrays.items()}
        if self.maker is not None and INPUTS not in arrays:
            arrays[INPUTS] = self._made(columns.table).numpy()
        return GroupColumns(table.num_rows, arrays, table.select([]))

    def first(self, group: RowGroup) -> Batch:
        """Read the first row of a row group."""
        found = self.whole(group, pa.Table.from_batches([group.first(self.schema.names)]))
        types = {name: INDEX if name == CLASSES else array.dtype for name, array in found.arrays.items()}
        return {name: torch.from_numpy(values.astype(types[name])) for name, values in found.arrays.items()}

    def _made(self, table: pa.Table) -> Tensor:
        assert self.maker is not None
        inputs = self.memory.tensor((table.num_rows, *self.maker.shape), self.maker.dtype)
        if table.num_rows:
            self.maker.fill(inputs.numpy(), table)
        return inputs


def _label_arrays(table: pa.Table, spec: SoftLabelSpec) -> dict[str, Array]:
    """Decode the labels of a table: [n, ...] of examples, [n, P, ...] of blocks of tokens."""
    if spec.unit == "token":
        tokens = decode_tokens(table, spec)
        found: dict[str, Array | None] = {
            LOGPROBS: tokens.logprobs,
            CLASSES: tokens.classes,
            TAIL: tokens.tail_logmass,
            TOKEN_LOGPROB: tokens.token_logprob,
        }
    else:
        labels = decode(table, spec)
        found = {LOGPROBS: labels.logprobs, CLASSES: labels.classes, TAIL: labels.tail_logmass}
    return {name: array for name, array in found.items() if array is not None}
