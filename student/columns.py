"""Columns of soft labels as arrays from which rows are taken into tensors.

What is a number in Parquet is an array as soon as it is read, without a copy where Arrow's memory has the right type.
Everything else (images, text) stays as it was stored until its rows are wanted, so that a rank decodes its own rows
only, and a window of images takes the memory of their files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

Batch = dict[str, Tensor]
Array = npt.NDArray[Any]
CLASSES, INPUTS, ROW = "teacher_classes", "inputs", "row"
WIDENING_ROWS = 512  # rows widened at a time, which stay in the cache
WIDER = {np.dtype(name): np.dtype(np.int64) for name in ("uint16", "uint32", "uint64")}  # torch cannot index by these


@dataclass(frozen=True)
class InputMaker:
    """Makes the student's input of Arrow columns.

    Attributes:
      config: which columns, and how.
      make: what `make_input` returned.
      shape: shape of one row's input.
      dtype: type of its numbers.
    """

    config: InputConfig
    make: MakeInput
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, config: InputConfig, group: RowGroup) -> InputMaker:
        """Make one whose shape is that of a row group's first row.

        Raises:
          ValueError: the input cannot be made, or is not one array of numbers.
        """
        make = make_input(config)
        wanted = [name for name in config.columns if name in group.file.schema.names]
        made = make(group.first(wanted))
        if not isinstance(made, np.ndarray) or made.dtype.kind not in "fiub":
            raise InputError(f"input of kind {config.kind!r} must be one array of numbers for a student")
        return cls(config, make, made.shape[1:], made.dtype)

    def fill(self, out: Array, table: pa.Table) -> None:
        """Make the input of a table's rows.

        Raises:
          InputError: a row's input has another shape than the first row's.
        """
        start = 0
        for batch in table.combine_chunks().to_batches():
            made = self.make(batch)
            if made.shape[1:] != self.shape:
                raise InputError(
                    f"inputs of all rows must have the shape {list(self.shape)} of the first, got {list(made.shape[1:])}"
                )
            out[start : start + len(made)] = made
            start += len(made)


class Columns:
    """Columns of some rows, held as arrays, and as Arrow what the input is still to be made of.

    Args:
      arrays: by name, each with one entry per row.
      maker: makes `inputs`; None where they are an array already, or not wanted.
      table: the columns that it needs.
      pinned: whether tensors are made in page-locked memory, from which a GPU copies while the processor goes on.
    """

    def __init__(
        self, arrays: Mapping[str, Array], maker: InputMaker | None, table: pa.Table | None, pinned: bool
    ) -> None:
        self.arrays, self.maker, self.table, self.pinned = arrays, maker, table, pinned

    def take(self, rows: Rows) -> Batch:
        """Copy rows into tensors of their own."""
        batch = {name: self._taken(name, array, rows) for name, array in self.arrays.items()}
        if self.maker is not None and self.table is not None:
            inputs = self._fresh((len(rows), *self.maker.shape), self.maker.dtype)
            if len(rows):
                self.maker.fill(inputs.numpy(), self.table.take(pa.array(rows)))
            batch[INPUTS] = inputs
        return batch

    def _taken(self, name: str, array: Array, rows: Rows) -> Tensor:
        dtype = np.dtype(np.int64) if name == CLASSES else array.dtype
        taken = self._fresh((len(rows), *array.shape[1:]), dtype)
        out = taken.numpy()
        if dtype == array.dtype:
            # every index is in range; any other mode than clip would copy once more
            np.take(array, rows, axis=0, out=out, mode="clip")
        else:
            for start in range(0, len(rows), WIDENING_ROWS):
                block = slice(start, start + WIDENING_ROWS)
                out[block] = np.take(array, rows[block], axis=0, mode="clip")
        return taken

    def _fresh(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype, pin_memory=self.pinned)


@dataclass(frozen=True)
class ColumnReader:
    """Reads row groups as Columns.

    Attributes:
      spec: of the soft labels.
      names: columns to read.
      maker: makes the student's input, or None for every carried column that is a tensor.
      pinned: whether tensors are made in page-locked memory.
    """

    spec: SoftLabelSpec
    names: Sequence[str]
    maker: InputMaker | None
    pinned: bool

    def read(self, groups: Sequence[RowGroup]) -> Columns:
        """Read row groups, one after another."""
        # rounds may have stored a column as another type of number
        table = pa.concat_tables([group.read(self.names) for group in groups], promote_options="permissive")
        return self._columns(table, np.concatenate([np.arange(g.first_row, g.first_row + g.rows) for g in groups]))

    def read_first(self, group: RowGroup) -> Batch:
        """Read the first row of a row group."""
        first = pa.Table.from_batches([group.first(self.names)])
        return self._columns(first, np.array([group.first_row])).take(np.zeros(1, np.int64))

    def read_all(self, groups: Sequence[RowGroup], threads: int) -> Columns:
        """Read all row groups and make their inputs, with the given number of threads."""
        first = self.read_first(groups[0])
        rows = groups[-1].first_row + groups[-1].rows
        arrays = {name: np.empty((rows, *value.shape[1:]), value.numpy().dtype) for name, value in first.items()}

        def fill(group: RowGroup) -> None:
            for name, value in self.read([group]).take(np.arange(group.rows)).items():
                arrays[name][group.first_row : group.first_row + group.rows] = value.numpy()

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, groups))
        return Columns(arrays, None, None, self.pinned)

    def _columns(self, table: pa.Table, numbers: Rows) -> Columns:
        for_input = () if self.maker is None else self.maker.config.columns
        arrays = {field.name: _numbers(table[field.name]) for field in table.schema if is_number(field.type)}
        arrays |= {f.name: _lists(table, f.name) for f in table.schema if is_carried_tensor(f) and self.maker is None}
        labels = decode(table, self.spec)
        arrays["teacher_logprobs"] = labels.logprobs
        if labels.classes is not None:
            arrays[CLASSES] = labels.classes
        if labels.tail_logmass is not None:
            arrays["teacher_tail_logmass"] = labels.tail_logmass
        arrays[ROW] = numbers
        return Columns(arrays, self.maker, table.select(list(for_input)).combine_chunks(), self.pinned)


def is_number(kind: pa.DataType) -> bool:
    """Tell whether a column of this type is a tensor of one number per row."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def is_carried_tensor(field: pa.Field) -> bool:
    """Tell whether a column holds lists of numbers of one length that are no labels."""
    lists = pa.types.is_fixed_size_list(field.type) and is_number(field.type.value_type)
    return bool(lists and not field.name.startswith("teacher_"))


def _numbers(column: pa.ChunkedArray) -> Array:
    """View a column as an array; missing values are NaN, in an integer column of float64."""
    array: Array = _joined(column).to_numpy(zero_copy_only=False)
    return array.astype(WIDER.get(array.dtype, array.dtype), copy=False)


def _lists(table: pa.Table, name: str) -> Array:
    joined = _joined(table[name])
    width = joined.type.list_size
    values = joined.flatten()
    if joined.null_count or values.null_count or len(values) != len(joined) * width:
        raise ValueError(f"column {name} must not have missing values in its lists; fill them before labelling")
    array: Array = values.to_numpy(zero_copy_only=False).reshape(len(joined), width)
    return array.astype(WIDER.get(array.dtype, array.dtype), copy=False)


def _joined(column: Any) -> Any:
    """Join the chunks of a column or table; one chunk is not copied."""
    if isinstance(column, pa.ChunkedArray) and column.num_chunks == 1:
        return column.chunk(0)
    return column.combine_chunks()
