"""Labelled rows with the columns that the teacher reads: those that the labels do not carry come out of the pool.

A run's labels say which row of the pool, or of the labelled set, each of them is; a labelling job's have the user's ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from distilbeam.pipelines.config import LabelConfig, RunConfig, load_any_config
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.labelling.label_rows import ROW
from distilbeam.pipelines.pool.read_splits import read_unit
from distilbeam.pipelines.pool.row_reader import RowReader
from distilbeam.pipelines.pool.splits import Pool, plan_pool
from distilbeam.settings import read_toml
from distilbeam.storage.paths import to_path

_BATCH_ROWS = 65_536


def with_read_columns(rows: pa.Table, dataset: str, config: Path, columns: Sequence[str]) -> pa.Table:
    """Add the columns that the teacher reads to labelled rows.

    Args:
      rows: the rows, with `example_id` and what they carry.
      dataset: the soft labels that they are of.
      config: the configuration whose teacher is asked; one of a run or a labelling job says where the pool is.
      columns: the columns that the teacher reads.

    Returns:
      The rows in their order, with all of these columns.

    Raises:
      ValueError: a column is neither carried nor found.
    """
    missing = [name for name in columns if name not in rows.column_names]
    if not missing:
        return rows
    listed = ", ".join(missing)
    if "data" not in read_toml(config):
        raise ValueError(
            f"the teacher reads {listed}, which {dataset} does not carry: give the configuration of the run or the "
            "labelling job, whose pool has it (--teacher CONFIG)"
        )
    settings = load_any_config(config)
    if ROW in rows.column_names and isinstance(settings, RunConfig):
        pool = _asked_pool(settings, to_path(dataset).resolve())
        found = _by_row(pool, rows[ROW].to_numpy(), missing)
    elif isinstance(settings, LabelConfig) and settings.data.id is not None:
        pool = plan_pool(to_path(settings.data.pool), _BATCH_ROWS, "data.pool", [settings.data.id, *missing])
        found = _by_id(pool, settings.data.id, rows["example_id"], missing)
    else:
        raise ValueError(
            f"the teacher reads {listed}, which {dataset} does not carry, and without data.id its rows cannot be found in "
            "the pool; carry it (data.carry) to compare answers"
        )
    for name in missing:
        rows = rows.append_column(name, found[name])
    return rows


def _asked_pool(settings: RunConfig, dataset: Path) -> Pool:
    """Return what the rows of a run's dataset are counted in: a labelled set that the teacher was asked about, or the pool."""
    directory = RunDirectory(to_path(settings.run.directory).resolve())
    run = Run(settings, directory)
    for name in ("validation", "test"):
        if dataset == directory.asked(name):
            return run.labelled_set(name).plan
    return run.inputs.pool


def _by_row(pool: Pool, wanted: npt.NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
    reader, order = RowReader(columns, _BATCH_ROWS), np.argsort(wanted, kind="stable")
    ascending, parts = wanted[order], []
    for unit in pool.units:
        low, high = np.searchsorted(ascending, [unit.pool_row, unit.pool_row + unit.rows])
        if high > low:
            parts += [batch for batch, _ in reader.read(unit, ascending[low:high] - unit.pool_row)]
    return pa.Table.from_batches(parts).take(pa.array(np.argsort(order)))


def _by_id(pool: Pool, id_column: str, wanted: pa.ChunkedArray, columns: Sequence[str]) -> pa.Table:
    """Find rows by the user's ids; a row that is no longer in the pool has nulls, which the teacher cannot answer."""
    ids = _as_bytes(wanted)
    parts: list[pa.Table] = []
    for unit in pool.units:
        for batch in read_unit(unit, [id_column, *columns], _BATCH_ROWS):
            table = pa.Table.from_batches([batch])
            table = table.set_column(table.schema.get_field_index(id_column), id_column, _as_bytes(table[id_column]))
            parts.append(table.filter(pc.is_in(table[id_column], ids.combine_chunks())))
    found = pa.concat_tables(parts)
    return found.select(columns).take(pc.index_in(ids, found[id_column].combine_chunks()))


def _as_bytes(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    text = ids if pa.types.is_binary(ids.type) or pa.types.is_large_binary(ids.type) else ids.cast(pa.large_string())
    return text.cast(pa.large_binary())
