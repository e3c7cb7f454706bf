"""Worker processes that are forked from a process that has imported everything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from distilbeam.pipelines.engine import forkserver

SUPPORT = Path(__file__).parents[2] / "support"


def temporary(tmp_path: Path) -> Path:
    """A folder for temporary files whose path is longer than the 107 bytes that a socket's name may have."""
    return tmp_path / ("long" * 30) / "temporary"


def program(tmp_path: Path, seconds: float) -> subprocess.Popen[str]:
    folder = temporary(tmp_path)
    folder.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SUPPORT / "parents_work.py"), str(tmp_path), str(seconds)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.05)


@pytest.mark.local_runner(reason="its worker processes are what is tested")
@pytest.mark.slow
def test_one_process_forks_the_workers_of_all_phases_and_says_nothing(tmp_path: Path) -> None:
    with program(tmp_path, 0.2) as driver:
        _, said = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    written = [(tmp_path / f"{item}.txt").read_text().split() for item in range(6)]
    assert len({parent for _, parent in written}) == 1
    assert len({worker for worker, _ in written[:4]}) == 2
    assert not {worker for worker, _ in written[:4]} & {worker for worker, _ in written[4:]}
    assert "INFO" not in said
    assert "sdk_worker" not in said
    assert not list(temporary(tmp_path).glob("distilbeam-workers-*"))


@pytest.mark.local_runner(reason="its worker processes are what is tested")
@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_nothing_running(tmp_path: Path) -> None:
    with program(tmp_path, 2.0) as driver:
        wait_for((tmp_path / "0.txt").exists)
        left = psutil.Process(driver.pid).children(recursive=True)
        assert len(left) == 5  # the server, two workers, and two processes that stand for them
        driver.send_signal(signal.SIGKILL)
        wait_for(lambda: not any(process.is_running() and process.status() != "zombie" for process in left), 20)
    assert not list(temporary(tmp_path).glob("distilbeam-workers-*"))
    assert not (tmp_path / "5.txt").exists()


@pytest.mark.parametrize(
    ("flags", "starts"),
    [
        (["--direct_running_mode=multi_processing", "--direct_num_workers=2"], True),
        (["--direct_running_mode", "multi_processing", "--runner=FnApiRunner"], True),
        (["--direct_running_mode=multi_processing", "--runner=DataflowRunner"], False),
        (["--direct_running_mode=multi_threading"], False),
        ([], False),
    ],
)
def test_begins_only_for_worker_processes(flags: list[str], starts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bool] = []
    monkeypatch.setattr(forkserver, "_server", lambda: started.append(True))
    forkserver.begin(flags)
    assert bool(started) == starts


def test_a_server_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "_MODULES", ("distilbeam.no_such_module",))
    server = forkserver._Server()
    with pytest.raises(RuntimeError, match="the process that starts workers ended"):
        server.wait()
