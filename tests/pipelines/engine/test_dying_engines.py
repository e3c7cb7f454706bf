"""Engines and workers that die while a labelling job is at work, Ctrl-C, and a killed driver: on real Prism and on Dask."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from engines import require_prism, wait_for
from labelling import calls_by_row, committed, finish, shards, started, write_job

from distilbeam.teacher.softlabels import read_manifest

pytestmark = pytest.mark.slow
ROWS = 240
REQUEST = 8  # rows


def slow_job(directory: Path, **more: Any) -> Path:
    """Write a labelling job whose teacher takes 50 ms a request: about two seconds in all."""
    directory.mkdir()
    write_job(directory, teacher={"arguments": {"log": "asked.log", "delay_s": 0.05}}, **more)
    return directory


def on_prism(*more: str) -> list[str]:
    return ["--", "--runner=PrismRunner", f"--prism_location={require_prism()}", *more]


def prisms_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The engines that a driver has started."""
    try:
        return [child for child in psutil.Process(process.pid).children() if "prism" in child.name()]
    except psutil.NoSuchProcess:
        return []


def kill_prism(process: subprocess.Popen[str]) -> None:
    assert process.poll() is None, process.communicate()
    (prism,) = prisms_of(process)
    prism.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = slow_job(tmp_path_factory.mktemp("undisturbed") / "d")
    finish(directory)
    return shards(directory)


@pytest.mark.parametrize("kills", [1, 3])
def test_a_killed_prism_costs_no_row_a_second_question(tmp_path: Path, undisturbed: Any, kills: int) -> None:
    directory = slow_job(tmp_path / "d")
    with started(directory, *on_prism()) as process:
        for kill in range(kills):
            wait_for(lambda kill=kill: committed(directory) > 4 * kill + 2 and prisms_of(process))
            kill_prism(process)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert shards(directory) == undisturbed
    assert set(calls_by_row(directory).values()) == {1}
    assert "Traceback" not in out + err
    assert out.count("it is submitted again for what is left") == kills
    assert str(directory / "job" / "engine.log") in out.replace("\n", "")


def test_a_run_whose_prism_is_killed_within_a_round_gives_the_same_bytes(tmp_path: Path) -> None:
    found = {}
    for name in ("undisturbed", "killed"):
        directory = tmp_path / name
        labels = directory / "run" / "labels" / "round=000"
        write_slow_run(directory)
        with started(directory, *on_prism(), command="run") as process:
            if name == "killed":
                entries = labels / "_manifest"
                wait_for(lambda e=entries, p=process: len(list(e.glob("*.json"))) > 2 or p.poll() is not None)
                kill_prism(process)
            out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        assert "Traceback" not in out + err
        assert out.count("it is submitted again for what is left") == (name == "killed")
        picks = {
            file.name: file.read_bytes() for file in (directory / "run" / "selected" / "round=000" / "picks").iterdir()
        }
        found[name] = picks, [(entry.key, entry.checksum) for entry in read_manifest(labels).entries]
        assert set(calls_by_row(directory).values()) == {1}
    assert found["killed"] == found["undisturbed"]


def write_slow_run(directory: Path) -> None:
    """Write a run of one round of 80 rows, whose teacher takes 200 ms for eight of them, as the command's configuration."""
    directory.mkdir()
    job = write_job(directory, teacher={"arguments": {"log": "asked.log", "delay_s": 0.2}})
    sets = {name: f"{name}.parquet" for name in ("labelled", "validation", "test")}
    settings = {
        "run": {"rounds": 1, "directory": "run"},
        "data": {"pool": "pool", "id": "key", **sets},
        "teacher": job["teacher"],
        "selection": {"method": "uniform", "budget": 80},
        "student": {"kind": "mlp", "hidden": [8], "input": {"columns": ["x"]}},
        "training": {"epochs": 3, "final_training": "apart", "self_training": False},
        "engine": job["engine"],
    }
    (directory / "label.toml").write_text(tomli_w.dumps(settings))


def test_an_engine_that_dies_at_once_ends_the_job_with_a_sentence(tmp_path: Path) -> None:
    directory = slow_job(tmp_path / "d")
    broken = tmp_path / "prism"
    broken.write_text("#!/bin/sh\necho no memory\nexit 1\n")
    broken.chmod(0o755)
    said = finish(directory, "--", "--runner=PrismRunner", f"--prism_location={broken}", status=1)
    assert "0 rows are done and 240 are left, the same command goes on with them" in said
    assert "Traceback" not in said
    assert "no memory" in (directory / "job" / "engine.log").read_text()
    finish(directory)
    assert set(calls_by_row(directory).values()) == {1}


RUNNERS = {
    "in process": list,
    "threads": lambda: ["--", "--direct_running_mode=multi_threading", "--direct_num_workers=2"],
    "processes": lambda: ["--", "--direct_running_mode=multi_processing", "--direct_num_workers=2"],
    "prism": on_prism,
    "dask": lambda: [
        "--",
        "--runner=DaskRunner",
    ],  # with a cluster of its own, whose processes a terminal interrupts too
}


LOCAL = pytest.mark.local_runner(reason="its ways of running are interrupted")


@pytest.mark.parametrize(
    "runner", [pytest.param(name, marks=() if name in ("prism", "dask") else LOCAL) for name in RUNNERS]
)
def test_an_interrupt_is_one_sentence_and_leaves_nothing_running(tmp_path: Path, undisturbed: Any, runner: str) -> None:
    if runner == "dask":
        pytest.importorskip("dask.distributed", reason="the Dask runner needs its packages")
    directory, flags = slow_job(tmp_path / "d"), RUNNERS[runner]()
    with started(directory, *flags) as process:
        wait_for(lambda: committed(directory) > 2)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # to all of the group, as a terminal does
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert err.startswith("stopped; the same command goes on from here")
    assert len(err.splitlines()) == 1, err
    wait_for(lambda: not any(_runs(child) for child in children), 20)
    finish(directory)
    assert shards(directory) == undisturbed
    assert set(calls_by_row(directory).values()) == {1}


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_killed_driver_leaves_no_prism(tmp_path: Path) -> None:
    directory = slow_job(tmp_path / "d")
    with started(directory, *on_prism()) as process:
        wait_for(lambda: committed(directory) > 2)
        (prism,) = prisms_of(process)
        process.kill()
        process.communicate()
        wait_for(lambda: not _runs(prism), 10)
