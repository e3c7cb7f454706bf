"""The default layout opened by tools that are not ours, with the values that were written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from distilbeam.teacher.softlabels import SoftLabels, SoftLabelSpec, decode, write_shard

SPECS = {
    "dense": SoftLabelSpec(10),
    "top_k": SoftLabelSpec(1000, "top_k", 8),
    "sampled": SoftLabelSpec(1000, "sampled", 20),
}


@pytest.fixture(params=SPECS)
def shard(
    request: pytest.FixtureRequest, tmp_path: Path, labelled: Callable[..., pa.Table]
) -> tuple[Path, SoftLabels, SoftLabelSpec]:
    spec = SPECS[request.param]
    table = labelled(np.random.default_rng(2).normal(size=(257, spec.num_classes)) * 3, spec)
    write_shard(tmp_path, "shard", table, spec, "k")
    return tmp_path / "shard.parquet", decode(table, spec), spec


def check(read: dict[str, Any], labels: SoftLabels) -> None:
    stored = np.stack([np.asarray(row, np.float32) for row in read["teacher_logprobs"]])
    np.testing.assert_array_equal(stored, labels.logprobs)
    if labels.classes is not None:
        np.testing.assert_array_equal(np.stack([np.asarray(row) for row in read["teacher_classes"]]), labels.classes)
    if labels.tail_logmass is not None:
        np.testing.assert_array_equal(np.asarray(read["teacher_tail_logmass"], np.float32), labels.tail_logmass)
    assert list(read["example_id"]) == [f"row-{i}" for i in range(257)]


def test_pyarrow_dataset(shard: Any) -> None:
    path, labels, spec = shard
    table = ds.dataset(path).to_table()
    check(table.to_pydict(), labels)
    np.testing.assert_array_equal(decode(table, spec).logprobs, labels.logprobs)


def test_pandas(shard: Any) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    path, labels, _spec = shard
    check(pandas.read_parquet(path), labels)


def test_duckdb(shard: Any) -> None:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    path, labels, _spec = shard
    with duckdb.connect() as connection:
        rows = connection.sql(f"select * from read_parquet('{path}')")
        check({name: [row[i] for row in rows.fetchall()] for i, name in enumerate(rows.columns)}, labels)


def test_hugging_face_datasets(shard: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face datasets is not installed")
    path, labels, spec = shard
    loaded = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    check(loaded.to_dict(), labels)
    np.testing.assert_array_equal(decode(loaded.with_format("arrow")[:], spec).logprobs, labels.logprobs)


@pytest.mark.parametrize("kind", SPECS)
def test_half_precision_columns_hold_the_same_values_and_duckdb_reads_them(
    kind: str, tmp_path: Path, labelled: Callable[..., pa.Table]
) -> None:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is not installed")
    logits = np.random.default_rng(2).normal(size=(100, SPECS[kind].num_classes))
    values = []
    for storage in ("float32", "float16"):
        spec = replace(SPECS[kind], storage=storage, carried=("half", "image"))  # type: ignore[arg-type]
        table = labelled(logits, spec).append_column(
            "half", pa.FixedSizeListArray.from_arrays(pa.array(np.arange(300, dtype=np.float16)), 3)
        )
        table = table.append_column("image", pa.array([bytes([i, 0]) for i in range(100)], pa.binary(2)))
        write_shard(tmp_path / storage, "s", table, spec, "k")
        path = tmp_path / storage / "s.parquet"
        read = pq.read_table(path)
        values.append(decode(read, spec).logprobs)
        with duckdb.connect() as connection:
            rows = connection.sql(f"select teacher_logprobs, half, image from read_parquet('{path}')").fetchall()
        stored = np.array(read["teacher_logprobs"].to_pylist(), np.float32)
        np.testing.assert_array_equal(np.array([row[0] for row in rows], np.float32), stored)
        assert [(list(row[1]), row[2]) for row in rows] == [
            ([3.0 * i, 3.0 * i + 1, 3.0 * i + 2], bytes([i, 0])) for i in range(100)
        ]
    np.testing.assert_array_equal(*values)
