"""Beam's ports for worker processes, on the loopback alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LISTENING = """
import os, sys, threading, time
import psutil
sys.path.insert(0, sys.argv[1])
from square_work import Squares
from pathlib import Path
from distilbeam.pipelines.engine.beam_options import pipeline_options
from distilbeam.pipelines.engine.phase import run_phase

seen = set()
done = threading.Event()

def look():
    while not done.is_set():
        for connection in psutil.Process().net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                seen.add(connection.laddr.ip)
        time.sleep(0.01)

looking = threading.Thread(target=look)
looking.start()
options = pipeline_options(["--direct_running_mode=multi_processing", "--direct_num_workers=2"])
run_phase("square", Squares(sys.argv[2]), list(range(4)), errors=Path(sys.argv[2]) / "errors", options=options)
done.set()
looking.join()
print(sorted(seen))
"""


@pytest.mark.slow
def test_worker_processes_talk_over_the_loopback(tmp_path: os.PathLike[str]) -> None:
    from problem import SUPPORT

    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LISTENING, str(SUPPORT), str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.replace("::ffff:", "").strip() == "['127.0.0.1']"
