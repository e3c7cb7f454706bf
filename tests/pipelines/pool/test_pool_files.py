"""Pools as other tools leave them: what the files need to agree on, which are read, and how large shards become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilbeam.pipelines.jobs.opening import require_apart
from distilbeam.pipelines.labelling.shard_plan import plan_shards
from distilbeam.pipelines.pool.read_splits import read_unit
from distilbeam.pipelines.pool.row_reader import RowReader
from distilbeam.pipelines.pool.splits import Pool, plan_pool
from distilbeam.teacher.softlabels import SoftLabelSpec


def write(file: Path, **columns: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)


def values(pool: Pool, column: str) -> list[object]:
    return [v for unit in pool.units for batch in read_unit(unit, [column], 100) for v in batch[column].to_pylist()]


def test_columns_that_nobody_reads_may_differ(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", id=[1, 2], extra=["x", "y"])
    write(tmp_path / "b.parquet", other=[0.5], id=[3])
    write(tmp_path / "c.parquet", id=[4], extra=pa.nulls(1))
    pool = plan_pool(tmp_path, 10, "data.pool", ["id"])
    assert values(pool, "id") == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"b.parquet has no column extra, which is read and other files have"):
        plan_pool(tmp_path, 10, "data.pool", ["id", "extra"])


def test_columns_that_are_read_get_the_type_that_holds_all(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", x=pa.array([1, 2], pa.int32()), t=pa.array(["a", "b"]).dictionary_encode())
    write(tmp_path / "b.parquet", x=[0.5], t=pa.array(["c"], pa.large_string()))
    write(tmp_path / "c.parquet", x=pa.nulls(1), t=pa.nulls(1))
    pool = plan_pool(tmp_path, 10, "data.pool", ["x", "t"])
    assert dict(pool.types)["x"] == pa.float64()
    assert values(pool, "x") == [1.0, 2.0, 0.5, None]
    assert values(pool, "t") == ["a", "b", "c", None]
    reader = RowReader(["x"], 10)
    assert [b["x"].type for u in pool.units for b, _ in reader.read(u, np.arange(u.rows))] == [pa.float64()] * 3
    write(tmp_path / "d.parquet", x=["text"], t=["d"])
    with pytest.raises(
        ValueError, match=r"d.parquet differs from the files before it in column\(s\) x, which is string there"
    ):
        plan_pool(tmp_path, 10, "data.pool", ["x"])


def test_hidden_files_and_folders_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.parquet", "day=1/b.parquet", "_delta_log/c.parquet", ".tmp/x/d.parquet", "_e.parquet"):
        write(tmp_path / name, id=[1])
    for where in (tmp_path, tmp_path / "**" / "*.parquet"):
        assert [name for name, _ in plan_pool(where, 10).files] == ["a.parquet", "day=1/b.parquet"]
    assert len(plan_pool(tmp_path / "_delta_log" / "*.parquet", 10).files) == 1, "a part that is spelt out is wanted"


def test_shards_are_bounded_in_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write(tmp_path / "a.parquet", id=np.arange(40), image=[rng.bytes(5_000) for _ in range(40)])
    pool = plan_pool(tmp_path, 100, "data.pool", ["id", "image"])
    carried = SoftLabelSpec(num_classes=3, carried=("image",))
    sizes = [shard.rows for task in plan_shards(pool.units, None, 100, carried, 50_000) for shard in task.shards]
    assert sum(sizes) == 40
    assert max(sizes) * 5_000 <= 50_000
    alone = [shard.rows for task in plan_shards(pool.units, None, 100, carried, 10) for shard in task.shards]
    assert alone == [1] * 40
    bare = SoftLabelSpec(num_classes=3)
    assert [s.rows for t in plan_shards(pool.units, None, 100, bare, 50_000) for s in t.shards] == [40], "not stored"


@pytest.mark.parametrize(
    ("run", "pool", "refused"),
    [
        ("run", "pool", False),
        ("pool/run", "pool", True),
        ("pool", "pool", True),
        ("pool/_run", "pool", False),
        ("pool/run", "pool/*.parquet", False),
        ("pool/run", "pool/**/*.parquet", True),
        ("run", "run/labels", True),
        (".", "pool", True),
        ("pool2", "pool", False),
    ],
)
def test_a_run_directory_and_its_pool_do_not_hold_each_other(
    tmp_path: Path, run: str, pool: str, refused: bool
) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "run" / "labels").mkdir(parents=True)
    if not refused:
        require_apart(tmp_path / run, tmp_path / pool, "data.pool")
        return
    with pytest.raises(ValueError, match=r"must not be inside .* labels would be read as rows to be labelled"):
        require_apart(tmp_path / run, tmp_path / pool, "data.pool")
