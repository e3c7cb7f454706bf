"""Judge students and their exports alike: quality on labelled examples, footprint in a fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.pipelines.pool.pool_files import open_parquet
from distilbeam.pipelines.pool.splits import Pool
from distilbeam.student.checkpoint import Student
from distilbeam.student.data.class_labels import INTEGERS, Integers
from distilbeam.student.data.usable_rows import find_usable
from distilbeam.student.evaluation.footprint import measure
from distilbeam.student.export.load import ExportedStudent, input_of

BATCH_ROWS = 1024
SAMPLED_GROUPS = 32
PROCESS_REPEATS = 50

Model = Student | ExportedStudent


def integers_of(model: Model) -> Integers | None:
    """Return what the whole numbers of a label column meant where the model learned; None where it does not know."""
    known = model.description["student"] if isinstance(model, ExportedStudent) else model.extra
    meant: Integers | None = known.get(INTEGERS)
    return meant


def logits_of(model: Model, table: pa.Table) -> npt.NDArray[np.float32]:
    """Ask a model about every row of a table.

    Args:
      model: a student or an export.
      table: with the columns that the model reads.

    Returns:
      float32 [rows, C].
    """
    columns = table.select(list(input_of(model).columns))
    return np.concatenate([model.logits(batch) for batch in columns.to_batches(max_chunksize=BATCH_ROWS)])


def cost(directory: Path, model: Model) -> dict[str, float]:
    """Measure a model's footprint, its latency and memory in a fresh process with one thread."""
    figures = {"parameters": model.num_parameters, "size_bytes": model.size_bytes}
    return {**figures, **measure(directory, repeats=PROCESS_REPEATS)}


def pool_examples(pool: Pool, config: InputConfig, rows: int, seed: int) -> npt.NDArray[Any]:
    """Draw examples of the pool, to calibrate on: some of the rows of some of its row groups.

    Args:
      pool: the planned pool.
      config: how columns become the input.
      rows: how many at most.
      seed: decides which row groups are read and which of their rows are taken.

    Returns:
      The inputs [rows, ...], without the rows that cannot be read.

    Raises:
      ValueError: none of the drawn rows can be read.
    """
    rng = np.random.default_rng([seed, pool.rows])
    groups = [(unit.path, group) for unit in pool.units for group in range(*unit.row_groups)]
    chosen = [groups[i] for i in np.sort(rng.permutation(len(groups))[:SAMPLED_GROUPS])]
    tables = [_row_group(path, group, config.columns) for path, group in chosen]
    table = pa.concat_tables(tables)
    taken = table.take(np.sort(rng.permutation(table.num_rows)[:rows])).combine_chunks()
    inputs = find_usable(make_input(config), taken.to_batches()[0]).inputs
    if inputs is None:
        raise ValueError(f"none of {taken.num_rows:,} examples drawn from the pool has an input that can be read")
    return inputs


def _row_group(path: str, group: int, columns: tuple[str, ...]) -> pa.Table:
    return open_parquet(Path(path), "data.pool").read_row_group(group, columns=list(columns))
