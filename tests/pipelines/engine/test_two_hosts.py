"""Dask workers on two hosts with a shared folder, one of which is cut off in the middle of its work and comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from engines import wait_for
from hosts import Host, hosts
from labelling import calls_by_row, committed, finish, shards, started, write_job
from problem import SUPPORT

pytestmark = pytest.mark.slow
CUT_OFF_S = 8.0
SETTINGS = {  # how long a silent worker is believed to be at work; Dask's own is five minutes
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "3s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "2s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s",
    "DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "2s",
}


@contextmanager
def dask_cluster(folder: Path, address: str, workers: Sequence[Host]) -> Iterator[str]:
    """Run a scheduler on this machine and a worker of one thread on each host; yield the scheduler's address."""
    environment = {**os.environ, **SETTINGS, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    place = folder / "scheduler.json"
    scheduler = ["scheduler", "--host", address, "--port", "0", "--no-dashboard", f"--scheduler-file={place}"]
    worker = ["worker", f"--scheduler-file={place}", "--nthreads", "1", "--no-dashboard", "--memory-limit", "0"]
    dask = [sys.executable, "-m", "dask"]
    # imported before they are at work: on a busy machine that takes longer than a silent worker is believed
    ready = ["--preload", "distilbeam.pipelines.labelling.phase"]
    with (folder / "dask.log").open("w") as log:

        def run(words: list[str]) -> subprocess.Popen[bytes]:
            return subprocess.Popen(words, stdout=log, stderr=log, env=environment, cwd=folder)

        programs = [run([*dask, *scheduler, *ready])]
        try:
            wait_for(place.exists)
            programs += [run(host.command(*dask, *worker, *ready)) for host in workers]
            from dask.distributed import Client

            with Client(scheduler_file=str(place), set_as_default=False) as client:
                client.wait_for_workers(len(workers), timeout=60)
                yield client.scheduler.address
        finally:
            for program in programs:
                program.kill()
                program.wait()


def test_a_host_that_is_cut_off_and_comes_back_costs_no_row_a_third_question(tmp_path: Path) -> None:
    pytest.importorskip("dask.distributed", reason="the Dask runner needs its packages")
    directories = [tmp_path / "alone", tmp_path / "two"]
    for directory in directories:
        directory.mkdir()
        write_job(directory, teacher={"arguments": {"log": "asked.log", "delay_s": 0.3}})
    finish(directories[0])
    directory = directories[1]
    with hosts(2) as (address, (first, second)), dask_cluster(directory, address, [first, second]) as scheduler:
        flags = ["--", "--runner=DaskRunner", f"--dask_client_address={scheduler}", "--dask_partition_size=3"]
        with started(directory, *flags) as process:
            wait_for(lambda: committed(directory) > 2)
            before = committed(directory)
            second.cut_off()
            time.sleep(CUT_OFF_S)
            during = committed(directory) - before
            second.connect()
            out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert during > 0, "the other host goes on"
    assert shards(directory) == shards(directories[0])
    assert max(calls_by_row(directory).values()) <= 2
    assert len(calls_by_row(directory)) == 240
