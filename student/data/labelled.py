"""Human-labelled examples as tensors: the rows of a table whose true class is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from distilbeam.inputs.config import InputConfig, make_input, require_columns
from distilbeam.student.data.class_labels import (
    ClassLabels,
    Integers,
    LabelError,
    brief,
    indices_of,
    parse_labels,
    reading_of,
)
from distilbeam.student.data.usable_rows import find_usable

MEANING_KEY = b"distilbeam.integer_labels"  # of a label column that holds names for the whole numbers it was read from


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


def read_examples(
    table: pa.Table,
    label_column: str,
    classes: Sequence[str],
    config: InputConfig,
    integers: Integers | None = None,
    name: str = "the labelled examples",
) -> Examples:
    """Read labelled examples.

    Args:
      table: with the columns of the input and the label.
      label_column: column with the true class; see `class_labels`.
      classes: names of the classes in the order of the logits.
      config: how columns become the input.
      integers: what whole numbers mean, where that is known.
      name: what to call them in errors.

    Returns:
      The examples, in the order of the table.

    Raises:
      ValueError: a column is missing, a label is unknown, or a row has no input of finite numbers.
    """
    indices = class_indices(table, label_column, classes, integers)
    inputs = inputs_of(table, config, lambda row: f"row {row:,} of {name}")
    return Examples(torch.cat([torch.tensor(part) for part in inputs]), torch.from_numpy(indices))


def inputs_of(table: pa.Table, config: InputConfig, row_name: Callable[[int], str]) -> list[npt.NDArray[np.generic]]:
    """Make the input of every row of a table.

    Args:
      table: with the columns of the input.
      config: how columns become the input.
      row_name: names a row in errors.

    Returns:
      The inputs [rows, ...] of the table's batches.

    Raises:
      ValueError: there is no row, or one has no input of finite numbers.
    """
    make = make_input(config)
    parts: list[npt.NDArray[np.generic]] = []
    start = 0
    for batch in table.select([name for name in config.columns if name in table.column_names]).to_batches():
        if batch.num_rows:
            require_columns(batch, config.columns)
            found = find_usable(make, batch, parts[0].shape[1:] if parts else None)
            if found.reasons:
                row = min(found.reasons)
                raise ValueError(
                    f"{row_name(start + row)} cannot be used: {found.reasons[row]}; correct it or leave it out"
                )
            assert found.inputs is not None
            parts.append(found.inputs)
            start += batch.num_rows
    if not parts:
        raise ValueError("labelled examples must have at least one row, got none")
    return parts


def class_indices(
    table: pa.Table, label_column: str, classes: Sequence[str], integers: Integers | None = None
) -> npt.NDArray[np.int64]:
    """Bring a label column to the indices of its classes; see `class_labels`.

    Args:
      table: with the label column.
      label_column: its name.
      classes: names of the classes in the order of the logits.
      integers: what whole numbers mean, where that is known.

    Returns:
      int64 [n].

    Raises:
      ValueError: the column is missing, a value is missing or no class, or whole numbers have two meanings.
    """
    if label_column not in table.column_names:
        raise ValueError(f"label column {label_column!r} must be one of {', '.join(table.column_names)}")
    name = f"label column {label_column!r}"
    labels = _parsed(table, label_column)
    reading = reading_of([labels], classes, name) if integers is None else integers
    indices, unknown = indices_of(labels, classes, reading)
    if len(unknown):
        row = int(unknown[0])
        value = repr(labels.texts[row].as_py()) if labels.numbers is None else labels.numbers[row]
        raise ValueError(
            f"{name} must hold one of the {len(classes)} classes {brief(classes)}, got {value} in row {row}"
        )
    return indices


def integers_meant(tables: Sequence[pa.Table | None], label_column: str, classes: Sequence[str]) -> Integers | None:
    """Tell what the whole numbers of a label column mean in tables that belong together.

    Args:
      tables: the tables; None is passed over.
      label_column: the column.
      classes: names of the classes in the order of the logits.

    Returns:
      "names" or "indices", to be remembered with a student; None where there are none, or where both are the same.

    Raises:
      ValueError: both fit, and mean different classes.
    """
    given = [table for table in tables if table is not None and label_column in table.column_names]
    for table in given:
        if (known := (table.schema.field(label_column).metadata or {}).get(MEANING_KEY)) is not None:
            return "names" if known == b"names" else "indices"
    name = f"label column {label_column!r}"
    return reading_of([_parsed(table, label_column) for table in given], classes, name)


def with_meaning(table: pa.Table, label_column: str, integers: Integers) -> pa.Table:
    """Say in a table what the whole numbers of its label column mean, for `integers_meant`."""
    if label_column not in table.column_names:
        return table
    at = table.column_names.index(label_column)
    field = table.schema.field(at).with_metadata({MEANING_KEY: integers.encode()})
    return table.set_column(at, field, table.column(at))


def _parsed(table: pa.Table, label_column: str) -> ClassLabels:
    name = f"label column {label_column!r}"
    try:
        return parse_labels(table[label_column], name)
    except LabelError as e:
        if e.value is None:
            missing = pc.sum(pc.is_null(table[label_column], nan_is_null=True)).as_py()
            raise ValueError(
                f"{name} must have a value in every row, {missing} are missing, the first in row {e.row}"
            ) from e
        raise ValueError(f"{name} must name classes, {e.value!r} in row {e.row} {e.problem}") from e
