"""`distilbeam workers`: worker processes for Prism, in number, killed, and told to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from apache_beam.portability.api import beam_fn_api_pb2, beam_fn_api_pb2_grpc
from engines import require_prism, wait_for
from labelling import calls_by_row, committed, finish, shards, started, write_job
from problem import SUPPORT

from distilbeam.pipelines.engine.worker_pool import WorkerPool

pytestmark = pytest.mark.slow
REQUEST = 8  # rows
Pool = tuple[subprocess.Popen[str], str]


@contextmanager
def workers(directory: Path, count: int) -> Iterator[Pool]:
    """Run `distilbeam workers` in a directory; yield its process and address."""
    words = [sys.executable, "-m", "distilbeam", "workers", "--count", str(count), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    pool = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=directory
    )
    try:
        assert pool.stdout is not None
        said = pool.stdout.readline()
        assert said.startswith(f"{count} worker(s) at "), said
        yield pool, said.split()[3].rstrip(".")
    finally:
        pool.send_signal(signal.SIGTERM)
        pool.communicate(timeout=60)


def harnesses(pool: subprocess.Popen[str]) -> list[psutil.Process]:
    """The worker processes: what the process that workers are forked from has forked."""
    return [worker for server in psutil.Process(pool.pid).children() for worker in server.children()]


def flags(address: str, count: int = 2) -> list[str]:
    prism = ["--runner=PrismRunner", f"--prism_location={require_prism()}"]
    external = ["--environment_type=EXTERNAL", f"--environment_config={address}"]
    return ["--", *prism, *external, f"--sdk_worker_parallelism={count}"]


def slow_job(directory: Path, **more: Any) -> Path:
    directory.mkdir()
    write_job(directory, teacher={"arguments": {"log": "asked.log", "delay_s": 0.05}}, **more)
    return directory


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    require_prism()
    directory = slow_job(tmp_path_factory.mktemp("undisturbed") / "d")
    finish(directory)
    return shards(directory)


def test_two_workers_share_the_work_and_write_the_same_bytes(tmp_path: Path, undisturbed: Any) -> None:
    directory = slow_job(tmp_path / "d")
    with workers(directory, 2) as (pool, address), started(directory, *flags(address)) as process:
        wait_for(lambda: len(harnesses(pool)) == 2 and committed(directory))
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        wait_for(lambda: not harnesses(pool), 15)
    assert shards(directory) == undisturbed
    assert set(calls_by_row(directory).values()) == {1}


def _kill_a_worker(pool: subprocess.Popen[str], _driver: subprocess.Popen[str]) -> None:
    harnesses(pool)[0].kill()


def _kill_prism(_pool: subprocess.Popen[str], driver: subprocess.Popen[str]) -> None:
    (prism,) = (child for child in psutil.Process(driver.pid).children() if "prism" in child.name())
    prism.kill()


@pytest.mark.parametrize(("kill", "asked_again"), [(_kill_a_worker, REQUEST), (_kill_prism, 0)])
def test_a_killed_worker_or_prism_costs_at_most_a_request(
    tmp_path: Path, undisturbed: Any, kill: Callable[..., None], asked_again: int
) -> None:
    directory = slow_job(tmp_path / "d")
    with workers(directory, 2) as (pool, address), started(directory, *flags(address)) as process:
        wait_for(lambda: len(harnesses(pool)) == 2 and committed(directory) > 3)
        kill(pool, process)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "it is submitted again for what is left" in out
    assert shards(directory) == undisturbed
    asked = calls_by_row(directory)
    assert sum(asked.values()) - len(asked) <= asked_again
    assert "Traceback" not in out + err


def test_a_pool_that_ends_lets_its_workers_keep_what_they_were_answered(tmp_path: Path) -> None:
    large = {
        "shard_rows": 40,
        "batch_rows": 40,
        "teacher_batch": 4,
    }  # a shard has ten requests: it ends in the middle of one
    directory = slow_job(tmp_path / "d", engine=large)
    with ExitStack() as stack:
        pool, address = stack.enter_context(workers(directory, 2))
        with started(directory, *flags(address)) as process:
            wait_for(lambda: len(harnesses(pool)) == 2 and committed(directory) > 1)
            stack.close()
            out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert "'distilbeam workers' starts one" in " ".join(err.split())
    assert "the same command goes on with them" in " ".join(err.split())
    finish(directory)
    asked = calls_by_row(directory)
    assert len(asked) == 240
    assert set(asked.values()) == {1}


def test_more_workers_than_there_are_places_are_refused() -> None:
    pool = WorkerPool(1, wait_s=0.2)
    address = pool.start()
    try:
        with grpc.insecure_channel(address) as channel:
            stub = beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolStub(channel)
            request = beam_fn_api_pb2.StartWorkerRequest(worker_id="one")
            request.control_endpoint.url = "localhost:1"  # nobody: the worker waits for it
            assert stub.StartWorker(request).error == ""
            request.worker_id = "two"
            refused = stub.StartWorker(request).error
            assert refused.startswith("all 1 workers of this pool are at work: start it with --count 2 or more")
            stub.StopWorker(beam_fn_api_pb2.StopWorkerRequest(worker_id="one"))
            wait_for(lambda: stub.StartWorker(request).error == "", 30)
    finally:
        pool.stop()


def test_a_taken_port_is_a_sentence() -> None:
    first, second = WorkerPool(1), WorkerPool(1)
    port = int(first.start().rpartition(":")[2])
    try:
        with pytest.raises(ValueError, match=f"--port {port} of 127.0.0.1 is not to be had"):
            second.start(port=port)
    finally:
        first.stop()
