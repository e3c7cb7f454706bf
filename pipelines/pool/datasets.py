"""The inputs of a run: the plan of the pool and the labelled sets, checked against each other before anything is spent."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from distilbeam.pipelines.config import RunConfig
from distilbeam.pipelines.pool.labelled_sets import LabelledSet, RawSet, join_sets, read_set
from distilbeam.pipelines.pool.pool_files import find_files
from distilbeam.pipelines.pool.reserved_names import require_free_names
from distilbeam.pipelines.pool.splits import Pool, plan_pool, plan_units
from distilbeam.storage.paths import to_path


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
    def rows_digests(self) -> dict[str, str]:
        """Hash of the rows of each labelled set as they are read, by the setting that names it."""
        sets = {"data.labelled": self.labelled, "data.validation": self.validation, "data.test": self.test}
        return {name: one.digest for name, one in sets.items()}

    @property
    def digest(self) -> str:
        """Hash of everything that the run reads: the pool, the rows of the labelled sets and the class names."""
        parts = [self.pool.digest, *self.rows_digests.values(), *self.classes]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()

    @property
    def files_digest(self) -> str:
        """Hash of the pool, the labelled sets' footers and the class names, which is what runs recorded first."""
        parts = [
            self.pool.digest,
            self.labelled.plan.digest,
            self.validation.plan.digest,
            self.test.plan.digest,
            *self.classes,
        ]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def load_inputs(config: RunConfig, former: tuple[str, ...] = ()) -> Inputs:
    """Plan the pool, read the labelled sets and check them.

    Args:
      config: the configuration.
      former: the classes that the run directory was started with, whose order is kept where they are still the same.

    Returns:
      The inputs.

    Raises:
      ValueError: a missing file or column, a column with a name of ours, columns whose types differ between the sets, an
        unknown class, a row without an input, a budget beyond the pool.
    """
    data = config.data
    student_columns = tuple(config.student.input.columns)
    teacher_columns = tuple(config.teacher.input.columns)
    _require_names(config)
    carried = tuple(dict.fromkeys([*student_columns, *data.carry]))
    vectors = [] if config.student.encoder is None else [config.student.encoder.column]
    read_too = [name for name in (data.id, *vectors) if name]
    wanted = tuple(dict.fromkeys([*carried, *teacher_columns, *read_too]))
    pool = plan_pool(to_path(data.pool), config.engine.unit_rows, "data.pool", wanted)
    require_columns(pool.columns, wanted, "data.pool")
    read = tuple(dict.fromkeys([*student_columns, *teacher_columns]))
    schema = pa.schema(pool.types)
    for name in vectors:
        if name and not _holds_vectors(schema.field(name).type):
            raise ValueError(
                f"student.encoder.column: {name} must hold lists of numbers, got {schema.field(name).type}"
            )
    raw = [_read(Path(path), name, config, read) for name, path in _sets(config).items()]
    for one in raw:
        _require_types(schema, one.table.schema, read, one.name)
    sets, classes = join_sets(raw, data.label, data.classes, former, data.integers, config.student.input)
    _require_budget(config, pool)
    test = sets.get("data.test", sets["data.validation"])
    return Inputs(
        pool, sets["data.labelled"], sets["data.validation"], test, classes, student_columns, teacher_columns, carried
    )


def _require_names(config: RunConfig) -> None:
    data = config.data
    columns: tuple[str, ...]
    for setting, columns in (
        ("student.input.columns", config.student.input.columns),
        ("teacher.input.columns", config.teacher.input.columns),
        ("data.carry", data.carry),
        ("data.label", (data.label,)),
        ("data.id", () if data.id in (None, "example_id") else (data.id,)),  # which is what becomes of it
    ):
        require_free_names(columns, setting)
    for setting, given in (("student", config.student.input), ("teacher", config.teacher.input)):
        if data.label in given.columns:
            raise ValueError(
                f"{setting}.input.columns must not hold {data.label}, which is data.label: it would be given the truth"
            )


def _holds_vectors(kind: pa.DataType) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)))


def _sets(config: RunConfig) -> dict[str, str]:
    data = config.data
    paths = {"data.labelled": data.labelled, "data.validation": data.validation, "data.test": data.test}
    return {name: path for name, path in paths.items() if path is not None}


def _read(path: Path, name: str, config: RunConfig, columns: Sequence[str]) -> RawSet:
    files = find_files(path, name)
    plan = plan_units(files, config.engine.unit_rows, name)
    require_columns(plan.columns, [config.data.label, *columns], name)
    return read_set(name, plan, [str(file) for file in files], config.data.label, columns)


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


def _require_budget(config: RunConfig, pool: Pool) -> None:
    total = config.run.rounds * config.selection.budget
    if total > pool.rows:
        raise ValueError(
            f"selection.budget times run.rounds must be at most the {pool.rows:,} examples of the pool, "
            f"got {config.selection.budget:,} x {config.run.rounds} = {total:,}"
        )
