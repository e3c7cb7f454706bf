"""Select and label give the same bytes on every local runner."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from engines import require_prism
from labelling import write_job
from problem import SUPPORT

from distilbeam.teacher.softlabels import read_manifest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.local_runner(reason="its ways of running are compared with the other runners, Prism among them"),
]

RUNNERS = {
    "threads": ["--direct_running_mode=multi_threading", "--direct_num_workers=2"],
    "processes": ["--direct_running_mode=multi_processing", "--direct_num_workers=2"],
    "dask": None,
    "prism": ["--runner=PrismRunner"],
}


def run(directory: Path, command: list[str], flags: list[str] | None) -> None:
    program = ["-m", "distilbeam"] if flags is not None else [str(SUPPORT / "on_dask.py")]
    words = [sys.executable, *program, *command, *(["--", *flags] if flags else [])]
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment, cwd=directory, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def carried_out(directory: Path, flags: list[str] | None) -> dict[str, Any]:
    """Label a pool, and select and label a round of a run; return everything that must not depend on the runner."""
    write_run(directory, write_job(directory))
    run(directory, ["label", "label.toml"], flags)
    run(directory, ["label", "run.toml", "--round", "0"], flags)
    round_0 = directory / "run" / "selected" / "round=000"
    return {
        "job": [(e.key, e.rows, e.checksum) for e in read_manifest(directory / "job" / "labels").entries],
        "gains": {p.name: p.read_bytes() for p in sorted((round_0 / "gains").iterdir())},
        "plan": (round_0 / "plan.json").read_bytes(),
        "picks": {p.name: p.read_bytes() for p in sorted((round_0 / "picks").iterdir())},
        "labels": [(e.key, e.checksum) for e in read_manifest(directory / "run" / "labels" / "round=000").entries],
    }


def write_run(directory: Path, job: dict[str, Any]) -> None:
    """Write `run.toml` beside `phase.toml`, with the same pool."""
    sets = {name: f"{name}.parquet" for name in ("labelled", "validation", "test")}
    settings = {
        "run": {"rounds": 1, "directory": "run"},
        "data": {"pool": "pool", "id": "key", **sets},
        "teacher": job["teacher"],
        "selection": {"method": "rad", "budget": 30},
        "student": {"kind": "mlp", "hidden": [8], "input": {"columns": ["x"]}},
        "training": {"epochs": 3},
        "engine": job["engine"],
    }
    (directory / "run.toml").write_text(tomli_w.dumps(settings))


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("in_process") / "d"
    return carried_out(directory, [])


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_runner_gives_the_same_bytes(
    tmp_path: Path, in_process: dict[str, Any], runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runner == "dask":
        pytest.importorskip("dask.distributed", reason="the Dask runner needs its packages")
    if runner == "prism":
        monkeypatch.setenv("PRISM", str(require_prism()))
    found = carried_out(tmp_path / "d", RUNNERS[runner])
    for name in in_process:
        assert found[name] == in_process[name], name
    assert len(found["job"]) == 36
    assert sum(rows for _, rows, _ in found["job"]) == 240
