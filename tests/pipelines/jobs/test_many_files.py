"""The work of planning and labelling grows as the number of files does, and no faster."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow.parquet as pq
import pytest
from labelling import labelled_ids, write_job
from problem import SUPPORT
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.engine.model_cache import forget_models

SIZES = (150, 300, 600)


def calls_of(command: str, monkeypatch: pytest.MonkeyPatch, directory: Path) -> int:
    """Count what a command calls, Python's functions and compiled ones, in this thread and those that begin meanwhile."""
    counts: Counter[int] = Counter()

    def profile(_frame: FrameType, event: str, _argument: Any) -> None:
        if event in {"call", "c_call"}:
            counts[threading.get_ident()] += 1

    monkeypatch.chdir(directory)
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        result = CliRunner().invoke(app, [command, "label.toml"], catch_exceptions=False)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    return counts.total()


def write_files(directory: Path, files: int) -> Path:
    """Write a job whose pool is files of one row each."""
    write_job(directory, pool_rows=files, engine={"unit_rows": 10_000, "shard_rows": 100, "batch_rows": 100})
    pool = directory / "pool"
    rows = [pq.read_table(file) for file in sorted(pool.glob("*.parquet"))]
    for file in pool.glob("*.parquet"):
        file.unlink()
    for number, row in enumerate(table.slice(row, 1) for table in rows for row in range(table.num_rows)):
        pq.write_table(row, pool / f"{number:05d}.parquet")
    return directory


@pytest.mark.parametrize("again", [False, True])
def test_no_work_is_done_for_pairs_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    monkeypatch.syspath_prepend(str(SUPPORT))
    forget_models()
    write_files(tmp_path / "warm", 20)
    for command in ("plan", "label"):  # what is imported and compiled at the first call is no work of theirs
        calls_of(command, monkeypatch, tmp_path / "warm")
    for files in SIZES:
        write_files(tmp_path / str(files), files)
        if again:
            calls_of("label", monkeypatch, tmp_path / str(files))
    for command in ("plan", "label"):
        few, more, many = (calls_of(command, monkeypatch, tmp_path / str(files)) for files in SIZES)
        # of a + b n + c n^2 calls for n files, c: a call for each pair of files, in either order, would make it 1
        slopes = (more - few) / (SIZES[1] - SIZES[0]), (many - more) / (SIZES[2] - SIZES[1])
        assert (slopes[1] - slopes[0]) / (SIZES[2] - SIZES[0]) < 0.3, f"{command}: {few}, {more}, {many} calls"
    assert len(labelled_ids(tmp_path / "600")) == 600
