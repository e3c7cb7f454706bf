"""A labelling job that every test can afford, in this process or as a program of its own: call it, kill it, count what it asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from problem import FEATURES, SUPPORT, asked, write_problem
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.engine.model_cache import forget_models
from distilbeam.teacher.softlabels import read_manifest

Command = Callable[..., str]


def write_job(directory: Path, pool_rows: int = 240, **more: dict[str, Any]) -> dict[str, Any]:
    """Write a pool and `label.toml`; `more` is merged into the sections."""
    problem = write_problem(directory, pool_rows)
    teacher = {**problem["teacher"], "arguments": {"log": "asked.log"}}  # relative: it is part of the fingerprint
    settings: dict[str, Any] = {
        "run": {"directory": "job"},
        "data": {"pool": "pool", "id": "key", "carry": ["x"], "num_classes": 3},
        "teacher": teacher,
        "engine": {"unit_rows": 40, "shard_rows": 8, "batch_rows": 16, "teacher_batch": 8},
    }
    for section, values in more.items():
        settings[section] = {**settings.get(section, {}), **values}
    (directory / "label.toml").write_text(tomli_w.dumps(settings))
    return settings


def command_in(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Give the command line in this process, in the job's directory; an error's sentence is the exception's."""
    monkeypatch.chdir(directory)
    monkeypatch.setenv("COLUMNS", "200")
    forget_models()

    def call(name: str, *arguments: str) -> str:
        result = CliRunner().invoke(app, [name, "label.toml", *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return call


def start(directory: Path, *arguments: str, command: str = "label") -> subprocess.Popen[str]:
    """Start `distilbeam label label.toml` in a session of its own, which can be killed with its workers."""
    words = [sys.executable, "-m", "distilbeam", command, "label.toml", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=directory,
        start_new_session=True,
    )


@contextmanager
def started(directory: Path, *arguments: str, command: str = "label") -> Iterator[subprocess.Popen[str]]:
    """Start it for a block that disturbs it; what is left of it then is killed."""
    process = start(directory, *arguments, command=command)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def committed(directory: Path) -> int:
    """Count the shards that are committed, while the job is at work."""
    return len(list((dataset(directory) / "_manifest").glob("*.json")))


def finish(directory: Path, *arguments: str, status: int = 0, command: str = "label") -> str:
    """Run the job to its end; return what it wrote."""
    process = start(directory, *arguments, command=command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, out + err
    return out + err


def dataset(directory: Path) -> Path:
    """The soft labels."""
    return directory / "job" / "labels"


def shards(directory: Path) -> list[tuple[str, int, str]]:
    """Key, rows and checksum of every committed shard."""
    return [(entry.key, entry.rows, entry.checksum) for entry in read_manifest(dataset(directory)).entries]


def labelled_ids(directory: Path) -> list[str]:
    """The ids with a label, in the order of the shards."""
    tables = [pq.read_table(path, columns=["example_id"]) for path in read_manifest(dataset(directory)).paths()]
    ids: list[str] = pa.concat_tables(tables)["example_id"].to_pylist()
    return ids


def pool_ids(directory: Path) -> list[str]:
    """The ids of the pool."""
    files = sorted((directory / "pool").glob("*.parquet"))
    return [key for file in files for key in pq.read_table(file)["key"].to_pylist()]


def calls_by_row(directory: Path) -> Counter[str]:
    """How often the teacher was asked about each row of the pool, by id."""
    names = {}
    for file in sorted((directory / "pool").glob("*.parquet")):
        table = pq.read_table(file)
        features = table["x"].combine_chunks().flatten().to_numpy().reshape(-1, FEATURES)
        names |= {row.tobytes().hex(): key for row, key in zip(features, table["key"].to_pylist(), strict=True)}
    return Counter(names[row] for row in asked(directory) if row in names)
