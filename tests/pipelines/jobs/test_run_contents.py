"""A run notices that its data changed where the footers did not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from problem import asked

from distilbeam.pipelines import run
from distilbeam.storage.files import read_json, write_json

OPTIONS: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}


def rewrite(file: Path, change: Any = None) -> None:
    table = pq.read_table(file)
    if change is not None:
        table = change(table)
    pq.write_table(table, file, **OPTIONS)


def another_vector(table: pa.Table) -> pa.Table:
    x = table["x"].combine_chunks()
    values = x.flatten().to_numpy().copy()
    values[5] += 1
    return table.set_column(
        table.column_names.index("x"),
        table.schema.field("x"),
        pa.FixedSizeListArray.from_arrays(pa.array(values), type=x.type),
    )


def other_labels(table: pa.Table) -> pa.Table:
    labels = pa.array(np.roll(table["label"].to_numpy(), 1))
    return table.set_column(table.column_names.index("label"), table.schema.field("label"), labels)


@pytest.mark.parametrize(
    ("file", "change", "named"),
    [
        ("pool/1.parquet", another_vector, r"values in pool file 1.parquet"),
        ("validation.parquet", other_labels, r"data.validation"),
    ],
)
def test_values_that_changed_under_one_footer_are_refused(
    problem: dict[str, Any], tmp_path: Path, file: str, change: Any, named: str
) -> None:
    path = tmp_path / file
    rewrite(path)
    run(problem, base=tmp_path, until=("select", 0))  # before that a pool file may be put right
    before = path.read_bytes()
    rewrite(path, change)
    assert len(path.read_bytes()) == len(before)
    with pytest.raises(ValueError, match=rf"the data changed since .* was started: {named}; put it back"):
        run(problem, base=tmp_path, until=("label", 0))
    path.write_bytes(before)
    run(problem, base=tmp_path, until=("label", 0))


def test_a_file_that_was_only_touched_is_the_same_and_all_can_be_read(problem: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "pool" / "1.parquet"
    rewrite(path)
    run(problem, base=tmp_path, until=("train", 0))
    os.utime(path, (1, 1))
    run(problem, base=tmp_path, until=("select", 0))
    state = path.stat()
    data = another_vector(pq.read_table(path))
    pq.write_table(data, tmp_path / "other.parquet", **OPTIONS)
    with path.open("r+b") as file:
        file.write((tmp_path / "other.parquet").read_bytes())
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    calls = len(asked(tmp_path))
    with pytest.raises(ValueError, match=r"values in pool file 1.parquet"):
        run(problem, base=tmp_path, until=("label", 0), check_content=True)
    assert len(asked(tmp_path)) == calls, "it is refused before the teacher is asked"


def test_a_run_of_a_version_that_knew_footers_only_goes_on(problem: dict[str, Any], tmp_path: Path) -> None:
    root = run(problem, base=tmp_path, until=("train", 0))
    frozen = read_json(root / "frozen.json")
    frozen.pop("contents")
    write_json(root / "frozen.json", frozen)
    run(problem, base=tmp_path, until=("select", 0))
    assert "contents" in read_json(root / "frozen.json")
