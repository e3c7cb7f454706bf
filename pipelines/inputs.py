"""What a run is given: the frozen plan of the pool and the labelled sets, checked against each other before anything is spent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distilbeam.pipelines.config import RunConfig
from distilbeam.pipelines.units import Pool, find_files, plan_pool, plan_units
from distilbeam.teacher.softlabels.places import within


@dataclass(frozen=True)
class LabelledSet:
    """Labelled examples.

    Attributes:
      plan: its files, planned like a pool.
      table: its rows, with the label column replaced by int64 class indices.
    """

    plan: Pool
    table: pa.Table

    def labels(self, column: str) -> pa.Array:
        """Return the class indices."""
        return self.table[column].combine_chunks()


@dataclass(frozen=True)
class Inputs:
    """The data of a run.

    Attributes:
      pool: the units of the unlabelled pool.
      labelled: what student 0 is trained on.
      validation: what measures the teacher and chooses checkpoints.
      test: what the final table is about; the validation set where no test set is given.
      classes: class names in the order of the teacher's outputs.
      student_columns: pool columns that the student reads.
      teacher_columns: pool columns that the teacher reads.
      carried: pool columns that are copied beside the labels.
    """

    pool: Pool
    labelled: LabelledSet
    validation: LabelledSet
    test: LabelledSet
    classes: tuple[str, ...]
    student_columns: tuple[str, ...]
    teacher_columns: tuple[str, ...]
    carried: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Hash of everything that the run reads: the pool, the labelled sets and the class names."""
        parts = [
            self.pool.digest,
            self.labelled.plan.digest,
            self.validation.plan.digest,
            self.test.plan.digest,
            *self.classes,
        ]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def load_inputs(config: RunConfig, base: Path) -> Inputs:
    """Plan the pool, read the labelled sets and check them.

    Args:
      config: the configuration.
      base: directory that relative paths are relative to.

    Returns:
      The inputs.

    Raises:
      ValueError: a missing file or column, columns whose types differ between the sets, an unknown class, a budget beyond
        the pool.
    """
    data = config.data
    student_columns = tuple(config.student.input.columns)
    teacher_columns = tuple(config.teacher.input.columns)
    carried = tuple(dict.fromkeys([*student_columns, *data.carry]))
    wanted = tuple(dict.fromkeys([*carried, *teacher_columns, *([data.id] if data.id else [])]))
    pool = plan_pool(within(base, data.pool), config.engine.unit_rows, "data.pool", wanted)
    require_columns(pool.columns, wanted, "data.pool")
    raw = {name: _read(base / path, name, config) for name, path in _sets(config).items()}
    read = tuple(dict.fromkeys([*student_columns, *teacher_columns]))
    schema = pa.schema(pool.types)
    for name, (_, table) in raw.items():
        require_columns(table.column_names, [data.label, *read], name)
        _require_types(schema, table.schema, read, name)
    classes = data.classes or _found_classes([table for _, table in raw.values()], data.label)
    sets = {name: LabelledSet(plan, _indexed(table, data.label, classes, name)) for name, (plan, table) in raw.items()}
    _require_budget(config, pool)
    test = sets.get("data.test", sets["data.validation"])
    return Inputs(
        pool, sets["data.labelled"], sets["data.validation"], test, classes, student_columns, teacher_columns, carried
    )


def _sets(config: RunConfig) -> dict[str, str]:
    data = config.data
    paths = {"data.labelled": data.labelled, "data.validation": data.validation, "data.test": data.test}
    return {name: path for name, path in paths.items() if path is not None}


def _read(path: Path, name: str, config: RunConfig) -> tuple[Pool, pa.Table]:
    files = find_files(path, name)
    plan = plan_units(files, config.engine.unit_rows, name)
    try:
        return plan, pa.concat_tables(pq.read_table(file, partitioning=None) for file in files)
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"{name}: {path} is damaged ({str(e).splitlines()[0]}); write it again") from e


def require_columns(found: Iterable[str], wanted: Iterable[str], name: str) -> None:
    found = list(found)
    missing = [column for column in wanted if column not in found]
    if missing:
        raise ValueError(f"{name} has no column {missing[0]}; its columns are {', '.join(found)}")


def _require_types(pool: pa.Schema, schema: pa.Schema, columns: Sequence[str], name: str) -> None:
    for column in columns:
        if pool.field(column).type != schema.field(column).type:
            raise ValueError(
                f"{name}: column {column} is {schema.field(column).type}, but {pool.field(column).type} in data.pool; "
                "the sets must have examples of one shape"
            )


def _found_classes(tables: Sequence[pa.Table], label: str) -> tuple[str, ...]:
    values = pa.chunked_array([chunk for table in tables for chunk in table[label].chunks]).unique()
    values = pc.drop_null(values)
    names = tuple(str(value) for value in values.take(pc.array_sort_indices(values)).to_pylist())
    if len(names) < 2:
        raise ValueError(
            f"data.label: the labelled sets must have at least two classes in column {label}, found {', '.join(names) or 'none'}"
        )
    return names


def _indexed(table: pa.Table, label: str, classes: tuple[str, ...], name: str) -> pa.Table:
    names = table[label].cast(pa.string())
    index = pc.index_in(names, value_set=pa.array(classes)).cast(pa.int64())
    if index.null_count:
        row = pc.is_null(index).to_pylist().index(True)
        value = names[row].as_py()
        raise ValueError(
            f"{name}: row {row:,} has the class {value!r} in column {label}, which is not one of the {len(classes)} classes "
            f"({', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}); correct the row or data.classes"
        )
    return table.set_column(table.column_names.index(label), label, index)


def _require_budget(config: RunConfig, pool: Pool) -> None:
    total = config.run.rounds * config.selection.budget
    if total > pool.rows:
        raise ValueError(
            f"selection.budget times run.rounds must be at most the {pool.rows:,} examples of the pool, "
            f"got {config.selection.budget:,} x {config.run.rounds} = {total:,}"
        )
