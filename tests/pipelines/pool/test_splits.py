from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilbeam.pipelines.pool.pool_files import find_files
from distilbeam.pipelines.pool.read_splits import answered_rows, read_unit
from distilbeam.pipelines.pool.splits import plan_units


def write(path: Path, rows: int, group: int = 10, first: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"x": np.arange(first, first + rows)}), path, row_group_size=group)
    return path


def test_units_cover_every_row_once_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", 35, first=100)
    write(tmp_path / "a.parquet", 100)
    pool = plan_units(find_files(tmp_path), target_rows=25)
    assert [(u.first_row, u.rows, u.pool_row) for u in pool.units] == [
        (0, 30, 0),
        (30, 30, 30),
        (60, 30, 60),
        (90, 10, 90),
        (0, 30, 100),
        (30, 5, 130),
    ]
    assert pool.rows == 135
    read = np.concatenate([b["x"].to_numpy() for unit in pool.units for b in read_unit(unit, ["x"], 7)])
    np.testing.assert_array_equal(read, [*range(100), *range(100, 135)])
    assert len({unit.uid for unit in pool.units}) == 6


def test_batches_are_bounded(tmp_path: Path) -> None:
    pool = plan_units([write(tmp_path / "a.parquet", 30)], target_rows=30)
    (unit,) = pool.units
    assert [b.num_rows for b in read_unit(unit, ["x"], 8)] == [8, 8, 8, 6]


def test_ids_follow_the_content_and_the_name_not_the_place(tmp_path: Path) -> None:
    one = plan_units([write(tmp_path / "one" / "a.parquet", 10)], 5)
    other = plan_units([write(tmp_path / "two" / "a.parquet", 10)], 5)
    assert [u.uid for u in one.units] == [u.uid for u in other.units]
    assert one.digest == other.digest
    changed = plan_units([write(tmp_path / "two" / "a.parquet", 10, first=1)], 5)
    assert {u.uid for u in changed.units}.isdisjoint(u.uid for u in one.units)
    renamed = plan_units([write(tmp_path / "two" / "b.parquet", 10)], 5)
    assert renamed.digest != one.digest


def test_empty_row_groups_and_files_make_no_units(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 0)
    write(tmp_path / "b.parquet", 3)
    assert [u.rows for u in plan_units(find_files(tmp_path), 10).units] == [3]


def test_an_empty_pool_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 0)
    with pytest.raises(
        ValueError, match=r"data.pool must have at least one row; its 1 file\(s\), the first .*a.parquet, have none"
    ):
        plan_units([path], 10, "data.pool")


def test_nothing_at_a_path_is_refused(tmp_path: Path) -> None:
    for missing in (tmp_path / "no.parquet", tmp_path / "*.parquet", tmp_path):
        with pytest.raises(ValueError, match=r"pool must name Parquet files, .*; nothing is at"):
            find_files(missing)


def test_hidden_and_marked_files_are_no_part_of_a_pool(tmp_path: Path) -> None:
    for name in ("a.parquet", ".tmp-b.parquet", "_c.parquet"):
        write(tmp_path / name, 1)
    assert [p.name for p in find_files(tmp_path)] == ["a.parquet"]


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(
        ValueError, match=r"pool: .*a.parquet cannot be read as Parquet \(.*\); write it again or take it out"
    ):
        plan_units([path], 10)


@pytest.mark.parametrize("checksums", [False, True])
def test_a_damaged_page_is_a_sentence(tmp_path: Path, checksums: bool) -> None:
    path = tmp_path / "a.parquet"
    numbers = np.random.default_rng(0).integers(0, 100, 5000)
    pq.write_table(
        pa.table({"x": numbers}), path, compression="zstd", use_dictionary=False, write_page_checksum=checksums
    )
    data = bytearray(path.read_bytes())
    data[300:2300] = bytes(reversed(data[300:2300]))
    path.write_bytes(data)
    (unit,) = plan_units([path], 10_000).units
    with pytest.raises(ValueError, match=r"a.parquet is damaged \(.*\); write it again or take it out of the pool"):
        list(read_unit(unit, ["x"], 1000))


def test_files_of_another_schema_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", 3)
    pq.write_table(pa.table({"x": ["text"], "y": [1]}), tmp_path / "b.parquet")
    with pytest.raises(
        ValueError, match=r"b.parquet differs from the first file in column\(s\) x, y; all files must have one schema"
    ):
        plan_units(find_files(tmp_path), 10)


@pytest.mark.parametrize(
    ("batch_rows", "classes", "rows"), [(65_536, 10, 65_536), (65_536, 1000, 16_777), (65_536, 10**9, 1), (7, 1000, 7)]
)
def test_answers_take_at_most_64_mib(batch_rows: int, classes: int, rows: int) -> None:
    assert answered_rows(batch_rows, classes) == rows
