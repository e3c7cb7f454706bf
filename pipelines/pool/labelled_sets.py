"""The labelled sets of a run, read and checked together before anything is trained or asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.inputs.config import InputConfig
from distilbeam.pipelines.pool.content_ids import content_ids
from distilbeam.pipelines.pool.splits import Pool
from distilbeam.student.data.class_labels import (
    ClassLabels,
    Integers,
    LabelError,
    brief,
    find_classes,
    indices_of,
    parse_labels,
    reading_of,
)
from distilbeam.student.data.labelled import inputs_of, with_meaning


@dataclass(frozen=True)
class LabelledSet:
    """Labelled examples.

    Attributes:
      plan: its files, planned like a pool.
      table: the columns that student and teacher read, and the label column, which holds names of classes.
      truth: int64 [rows], the indices of these classes.
      student_columns: columns that the student reads.
    """

    plan: Pool
    table: pa.Table
    truth: npt.NDArray[np.int64]
    student_columns: tuple[str, ...]

    @cached_property
    def ids(self) -> list[bytes]:
        """The hash of what the student reads of each row."""
        return content_ids(self.table.select(list(dict.fromkeys(self.student_columns))))

    @cached_property
    def digest(self) -> str:
        """Hash of the rows as they are read: the truth and the columns, in their order."""
        label = self.table.column_names[-1]
        digest = hashlib.blake2b(self.truth.astype("<i8").tobytes(), digest_size=16)
        for row in content_ids(self.table.drop_columns([label])):
            digest.update(row)
        return digest.hexdigest()


@dataclass(frozen=True)
class RawSet:
    """A labelled set before its labels are brought to classes.

    Attributes:
      name: the setting that names it.
      plan: its files, planned like a pool.
      files: path and rows of each file, in the order of the rows.
      table: the columns that are read, without the label.
      labels: the labels of each file.
    """

    name: str
    plan: Pool
    files: tuple[tuple[str, int], ...]
    table: pa.Table
    labels: tuple[ClassLabels, ...]

    def place(self, row: int) -> tuple[str, int]:
        """Give the file that holds a row, and the row's number there."""
        for path, rows in self.files:
            if row < rows:
                return path, row
            row -= rows
        raise IndexError(row)


def read_set(name: str, plan: Pool, paths: Sequence[str], label: str, columns: Sequence[str]) -> RawSet:
    """Read a labelled set.

    Args:
      name: the setting that names it.
      plan: its files, planned.
      paths: its files, in the order of the plan.
      label: column with the true class.
      columns: other columns to read.

    Raises:
      ValueError: a file is damaged, or a label is missing or names no class.
    """
    tables, labels = [], []
    for path in paths:
        try:
            table = pq.read_table(path, columns=list(dict.fromkeys([*columns, label])), partitioning=None)
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{name}: {path} is damaged ({str(e).splitlines()[0]}); write it again") from e
        labels.append(_parsed(table[label], name, label, path))
        tables.append(table.drop_columns([label]))
    files = tuple(zip(paths, (table.num_rows for table in tables), strict=True))
    return RawSet(name, plan, files, pa.concat_tables(tables), tuple(labels))


def join_sets(
    raw: Sequence[RawSet],
    label: str,
    given: tuple[str, ...],
    former: tuple[str, ...],
    integers: Integers | None,
    student: InputConfig,
) -> tuple[dict[str, LabelledSet], tuple[str, ...]]:
    """Bring the labels of sets to classes, and look at every row that the student is to read.

    Args:
      raw: the sets.
      label: name of the label column.
      given: names of the classes in order; found in the labels where there are none.
      former: the order in which a run directory has the classes that are found, or none.
      integers: what whole numbers mean, where it is said and the classes are given.
      student: how columns become the student's input.

    Returns:
      The sets by name, and the classes.

    Raises:
      ValueError: a label that is no class or could be two, or a row that has no input.
    """
    column = f"data.label: column {label}"
    labels = [part for one in raw for part in one.labels]
    if given:
        classes, integers = given, integers or reading_of(labels, given, column)
    else:
        found = find_classes(labels, column)
        classes, integers = former if set(former) == set(found) else found, "names"
    for one in raw:
        inputs_of(one.table, student, partial(_row_name, one))
    return {one.name: _joined(one, label, classes, integers, tuple(student.columns)) for one in raw}, classes


def _parsed(column: pa.ChunkedArray, name: str, label: str, path: str) -> ClassLabels:
    try:
        return parse_labels(column, f"{name}: column {label}")
    except LabelError as e:
        raise _no_class(name, e.row, e.value, label, e.problem, path) from e


def _no_class(name: str, row: int, value: object, label: str, problem: str, path: str) -> ValueError:
    return ValueError(
        f"{name}: row {row:,} has the class {value!r} in column {label}, which {problem}; correct the row of {path}"
    )


def _row_name(one: RawSet, row: int) -> str:
    path, number = one.place(row)
    return f"{one.name}: row {number:,} of {path}"


def _joined(
    one: RawSet, label: str, classes: tuple[str, ...], integers: Integers | None, student_columns: tuple[str, ...]
) -> LabelledSet:
    parts = []
    for (path, _), labels in zip(one.files, one.labels, strict=True):
        indices, unknown = indices_of(labels, classes, integers)
        if len(unknown):
            row = int(unknown[0])
            problem = f"is not one of the {len(classes)} classes ({brief(classes)})"
            raise _no_class(one.name, row, labels.texts[row].as_py(), label, problem, f"{path} or data.classes")
        parts.append(indices)
    truth = np.concatenate(parts)
    names = pa.DictionaryArray.from_arrays(pa.array(truth, pa.int32()), pa.array(list(classes), pa.string()))
    table = one.table.append_column(label, names)
    return LabelledSet(
        one.plan, table if integers is None else with_meaning(table, label, integers), truth, student_columns
    )
