"""Human-labelled examples as tensors: the rows of a table whose true class is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from distilbeam.teacher.preprocess import InputConfig, make_input


@dataclass(frozen=True)
class Examples:
    """Examples with their true classes.

    Attributes:
      inputs: float32 [n, ...].
      classes: int64 [n].
    """

    inputs: Tensor
    classes: Tensor

    def __len__(self) -> int:
        return len(self.classes)


def read_examples(table: pa.Table, label_column: str, classes: Sequence[str], config: InputConfig) -> Examples:
    """Read labelled examples.

    Args:
      table: with the columns of the input and the label.
      label_column: column with the true class: a name out of `classes`, or an integer, its index.
      classes: names of the classes in the order of the logits.
      config: how columns become the input.

    Returns:
      The examples, in the order of the table.

    Raises:
      ValueError: a column is missing or a label is unknown.
    """
    indices = class_indices(table, label_column, classes)
    columns = table.select([name for name in table.column_names if name != label_column or name in config.columns])
    make = make_input(config)
    parts = [torch.tensor(make(batch)) for batch in columns.to_batches() if batch.num_rows]
    if not parts:
        raise ValueError("labelled examples must have at least one row, got none")
    return Examples(torch.cat(parts), torch.from_numpy(indices))


def class_indices(table: pa.Table, label_column: str, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Bring a label column to the indices of its classes.

    Args:
      table: with the label column.
      label_column: its name.
      classes: names of the classes in the order of the logits.

    Returns:
      int64 [n].

    Raises:
      ValueError: the column is missing, or a value is missing or no class.
    """
    if label_column not in table.column_names:
        raise ValueError(f"label column {label_column!r} must be one of {', '.join(table.column_names)}")
    column = table[label_column].combine_chunks()
    if column.null_count:
        raise ValueError(
            f"label column {label_column!r} must have a value in every row, {column.null_count} are missing"
        )
    if pa.types.is_integer(column.type):
        indices: npt.NDArray[np.int64] = column.to_numpy(zero_copy_only=False).astype(np.int64)
        bad = np.flatnonzero((indices < 0) | (indices >= len(classes)))
    else:
        position = {name: index for index, name in enumerate(classes)}
        indices = np.array([position.get(str(value), -1) for value in column.to_pylist()], np.int64)
        bad = np.flatnonzero(indices < 0)
    if len(bad):
        value = column[int(bad[0])].as_py()
        raise ValueError(
            f"label column {label_column!r} must hold one of the {len(classes)} classes {_brief(classes)}, "
            f"got {value!r} in row {bad[0]}"
        )
    return indices


def _brief(classes: Sequence[str]) -> str:
    return ", ".join(classes) if len(classes) <= 12 else f"{', '.join(classes[:10])}, ..., {classes[-1]}"
