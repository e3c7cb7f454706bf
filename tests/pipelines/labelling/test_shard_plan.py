"""How rows become shards and tasks, and that a row group is decoded once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilbeam.pipelines.labelling.shard_plan import Task, plan_shards, read_rows
from distilbeam.pipelines.pool import row_reader
from distilbeam.pipelines.pool.pool_files import find_files
from distilbeam.pipelines.pool.row_reader import RowReader
from distilbeam.pipelines.pool.splits import Pool, plan_units
from distilbeam.teacher.softlabels import SoftLabelSpec

SPEC = SoftLabelSpec(num_classes=3, teacher="t")


def pool(directory: Path, files: list[int], group_rows: int, unit_rows: int = 1) -> Pool:
    first = 0
    for number, rows in enumerate(files):
        table = pa.table({"x": np.arange(first, first + rows)})
        pq.write_table(table, directory / f"{number:03d}.parquet", row_group_size=group_rows)
        first += rows
    return plan_units(find_files(directory), unit_rows)


def pick(directory: Path, plan: Pool, rows: np.ndarray) -> str:
    """Write picks of rows of the pool, as `choose` does."""
    directory.mkdir()
    for unit in plan.units:
        own = rows[(rows >= unit.pool_row) & (rows < unit.pool_row + unit.rows)] - unit.pool_row
        if len(own):
            table = pa.table({"row": own, "gain": own.astype(np.float32)})
            pq.write_table(table, directory / f"{unit.uid}.parquet")
    return str(directory)


def rows_of(tasks: list[Task], picks: str | None = None, batch_rows: int = 7) -> list[list[int]]:
    """Read every shard, a reader per task as a worker does."""
    found = []
    for task in tasks:
        reader = RowReader(["x"], batch_rows)
        for shard in task.shards:
            tables = [table for part in shard.parts for table in read_rows(reader, part, picks)]
            assert all(table.num_rows <= batch_rows for table in tables)
            read = pa.concat_tables(tables)
            assert read["x"].equals(read["pool_row"]), "each row knows its place in the pool"
            found.append(read["x"].to_pylist())
    return found


def test_shards_end_where_row_groups_end(tmp_path: Path) -> None:
    plan = pool(tmp_path, [50, 35], group_rows=20)
    tasks = plan_shards(plan.units, None, 32, SPEC)
    assert [[shard.rows for shard in task.shards] for task in tasks] == [[20], [30], [20], [15]]
    assert [row for shard in rows_of(tasks) for row in shard] == list(range(85))


def test_neighbours_together_exceed_the_limit(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    plan = pool(tmp_path, rng.integers(1, 90, 12).tolist(), group_rows=25, unit_rows=60)
    sizes = [shard.rows for task in plan_shards(plan.units, None, 64, SPEC) for shard in task.shards]
    assert sum(sizes) == plan.rows
    assert max(sizes) <= 64
    assert all(a + b > 64 for a, b in pairwise(sizes))


def test_a_large_row_group_is_cut_into_equal_parts_and_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pool(tmp_path, [100, 10], group_rows=100)
    (large, small) = plan_shards(plan.units, None, 30, SPEC)
    assert [shard.rows for shard in large.shards] == [25, 25, 25, 25]
    assert [shard.rows for shard in small.shards] == [10]
    opened = []
    read_groups = row_reader.read_groups
    monkeypatch.setattr(row_reader, "read_groups", lambda *a: opened.append(a[2]) or read_groups(*a))
    assert [row for shard in rows_of([large]) for row in shard] == list(range(100))
    assert opened == [[0]], "one pass over the row group for four shards"


def test_keys_belong_to_rows_teacher_and_form(tmp_path: Path) -> None:
    plan = pool(tmp_path, [40], group_rows=20)

    def keys(spec: SoftLabelSpec, shard_rows: int = 20) -> list[str]:
        return [shard.key for task in plan_shards(plan.units, None, shard_rows, spec) for shard in task.shards]

    assert keys(SPEC) == keys(SPEC)
    assert len(set(keys(SPEC))) == 2
    others = [keys(SoftLabelSpec(num_classes=3, teacher="u")), keys(SPEC, 10)]
    others.append(keys(SoftLabelSpec(num_classes=3, teacher="t", kind="top_k", k=2)))
    assert not any(set(keys(SPEC)) & set(other) for other in others)


@pytest.mark.parametrize("share", [0.02, 0.4, 1.0])
def test_chosen_rows_are_read_once_each_from_the_row_groups_that_hold_them(tmp_path: Path, share: float) -> None:
    (tmp_path / "pool").mkdir()
    plan = pool(tmp_path / "pool", [120, 33, 250], group_rows=50, unit_rows=90)
    rows = np.flatnonzero(np.random.default_rng(3).random(plan.rows) < share)
    picks = pick(tmp_path / "picks", plan, rows)
    tasks = plan_shards(plan.units, picks, 16, SPEC)
    read = rows_of(tasks, picks)
    assert [row for shard in read for row in shard] == rows.tolist()
    assert {len(shard) for shard in read[:-1]} <= {16}
    assert 0 < len(read[-1]) <= 16


def test_dense_picks_of_a_large_row_group_are_one_task(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    plan = pool(tmp_path / "pool", [200], group_rows=200)
    picks = pick(tmp_path / "picks", plan, np.arange(0, 200, 2))
    assert [len(task.shards) for task in plan_shards(plan.units, picks, 20, SPEC)] == [5]
