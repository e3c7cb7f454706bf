"""Rows of the pool that a student cannot read are left out of the choice, listed and never paid for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to
from problem import labels_of, make_table

from distilbeam.pipelines.steps import run
from distilbeam.pipelines.transforms.select_examples import SelectExamples

BAD = {(0, 3): math.nan, (1, 17): None, (3, 59): math.inf, (3, 58): 1e38}


def spoil(directory: Path) -> None:
    for number in range(4):
        file = directory / "pool" / f"{number}.parquet"
        table = pq.read_table(file)
        x = [list(row) for row in table["x"].to_pylist()]
        for (where, row), value in BAD.items():
            if where == number:
                x[row][2] = value
        spoilt = table.set_column(1, "x", pa.array(x, pa.list_(pa.float32(), 4)))
        pq.write_table(spoilt, file, row_group_size=20)


@pytest.mark.parametrize("method", ["herding", "greedy", "rad", "uniform"])
def test_a_run_goes_on_without_them(
    problem: dict[str, Any], tmp_path: Path, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(tmp_path)
    problem["selection"] |= {"method": method, "budget": 118}  # 236 of the 236 that are left
    root = run(problem, base=tmp_path)
    bought = {
        row for number in range(2) for row in labels_of(root / "labels" / f"round={number:03d}")["pool_row"].to_pylist()
    }
    bad = {60 * file + row for file, row in BAD}
    assert bought == set(range(240)) - bad
    assert not (root / "deadletter" / "round=000").exists()
    listed = [
        json.loads(line) for line in (root / "selected" / "round=000" / "unusable.jsonl").read_text().splitlines()
    ]
    assert {(Path(row["file"]).name, row["row"]) for row in listed} == {(f"{file}.parquet", row) for file, row in BAD}
    reasons = {row["row"]: row["reason"] for row in listed}
    assert reasons[3] == "number 3 of its input is nan, which is not a finite number"
    assert reasons[17] == "column x must not have missing values, got 1"
    assert reasons[58] == "number 3 of its input is 1e+38, which is too large for a network of float32"
    assert "The student cannot read 4 row(s) of the pool, which are left out" in caplog.text
    metrics = json.loads((root / "report" / "metrics.json").read_text())
    assert metrics["unusable"] == {
        "rows": 4,
        "lists": ["selected/round=000/unusable.jsonl", "selected/round=001/unusable.jsonl"],
    }
    assert "The student cannot read 4 row(s) of the pool" in (root / "report" / "report.html").read_text()
    # neither those of the comparison, which chooses among all that can be read
    chosen = labels_of(root / "uniform" / "labels" / "round=000")["pool_row"].to_pylist()
    assert set(chosen) == set(range(240)) - bad


@pytest.mark.parametrize("method", ["herding", "uniform"])
def test_a_budget_beyond_what_can_be_read_is_refused(problem: dict[str, Any], tmp_path: Path, method: str) -> None:
    spoil(tmp_path)
    problem["selection"] |= {"method": method, "budget": 120}
    with pytest.raises(
        ValueError, match=r"selection.budget must be at most the 116 examples that are left in the pool, got 120"
    ):
        run(problem, base=tmp_path)


def test_a_stream_leaves_them_out(problem: dict[str, Any], tmp_path: Path) -> None:
    root = run(problem, base=tmp_path, until=("train", 0))
    table = make_table(40, 7, labelled=False)
    x = [list(row) for row in table["x"].to_pylist()]
    x[4][0], x[30][1] = math.nan, None
    batch = table.set_column(1, "x", pa.array(x, pa.list_(pa.float32(), 4))).combine_chunks().to_batches()[0]
    with beam.Pipeline(FnApiRunner()) as pipeline:
        chosen = (
            pipeline
            | beam.Create([batch])
            | SelectExamples(root / "students" / "round=000", 38, wrong_share=0.1)
            | beam.FlatMap(lambda rows: rows["key"].to_pylist())
        )
        assert_that(chosen, equal_to([key for i, key in enumerate(table["key"].to_pylist()) if i not in (4, 30)]))


def test_a_stream_refuses_a_column_that_it_adds(problem: dict[str, Any], tmp_path: Path) -> None:
    root = run(problem, base=tmp_path, until=("train", 0))
    batch = make_table(4, 7, labelled=False).append_column("gain", pa.array(np.zeros(4))).to_batches()[0]
    with (
        pytest.raises(Exception, match="SelectExamples: the column gain has a name"),
        beam.Pipeline(FnApiRunner()) as pipeline,
    ):
        _ = pipeline | beam.Create([batch]) | SelectExamples(root / "students" / "round=000", 2, wrong_share=0.1)
