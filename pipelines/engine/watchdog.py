"""A watchdog for pipelines whose runner waits for ever when one of its worker processes dies.

Beam's FnApiRunner with `--direct_running_mode=multi_processing` starts worker processes and does not notice when one of
them is killed, by the kernel for want of memory, say: the job hangs. Here the pipeline runs in a thread of its own; when a
worker process has been gone for a while and the pipeline is still not at its end, the other workers are ended, the pipeline
is given up, and the caller decides what to repeat. Nothing is lost: what was committed is committed.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from typing import Any

import psutil
from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines.engine.ending import give_up
from distilbeam.pipelines.engine.forkserver import CLIENT, deaths, in_processes

_FIRST_LOOK_S = 0.02  # a worker may die at once
_CONNECTIONS = ("beam_control_read", "read_grpc_client_inputs", "run_worker")  # Beam's threads, by name
_hooks: list[Any] = []


class WorkerLostError(RuntimeError):
    """A worker process ended while the pipeline needed it."""


def run_watched(pipeline: Any, options: PipelineOptions, *, grace_s: float = 5.0, poll_s: float = 0.5) -> Any:
    """Run a pipeline to its end.

    Args:
      pipeline: the Beam pipeline.
      options: its options; only the multi-processing mode of the local runner is watched.
      grace_s: seconds that a pipeline may go on after a worker has ended, as it does at the end of a normal run.
      poll_s: seconds between two looks at the workers.

    Returns:
      The pipeline's result.

    Raises:
      WorkerLostError: a worker process died.
      Exception: whatever the pipeline raises.
    """
    if not in_processes(options):
        return _finished(pipeline)
    _silence_connections()
    outcome: Future[Any] = Future()
    threading.Thread(target=_run, args=(pipeline, outcome), daemon=True).start()
    workers: dict[int, psutil.Process] = {}
    gone_since: float | None = None
    before = deaths().keys()
    wait_s = _FIRST_LOOK_S
    while not _ended(outcome, wait_s):
        wait_s = min(poll_s, 2 * wait_s)
        workers |= {process.pid: process for process in _workers()}
        alive = [process for process in workers.values() if _alive(process)]
        died = {process: how for process, how in deaths().items() if process not in before}
        if len(alive) == len(workers) and not died:
            continue
        gone_since = gone_since or time.monotonic()
        if time.monotonic() - gone_since > grace_s:
            give_up()
            for process in alive:
                process.kill()
            lost = max(1, len(workers) - len(alive), len(died))
            how = ", ".join(sorted(set(died.values()))) or "killed, or out of memory"
            raise WorkerLostError(f"{lost} of {max(lost, len(workers))} worker processes died ({how})")
    return outcome.result()


def _silence_connections() -> None:
    """Say nothing of the connections of a worker that died, which Beam's threads end with; the driver says that it died."""
    logging.getLogger("apache_beam.runners.worker.data_plane").setLevel(logging.CRITICAL)
    former = threading.excepthook
    if former is not _without_connections:
        _hooks.append(former)
        threading.excepthook = _without_connections


def _without_connections(arguments: Any) -> None:
    if arguments.thread is None or not arguments.thread.name.startswith(_CONNECTIONS):
        _hooks[-1](arguments)


def _run(pipeline: Any, outcome: Future[Any]) -> None:
    try:
        outcome.set_result(_finished(pipeline))
    except BaseException as e:  # noqa: BLE001  # the caller raises it
        outcome.set_exception(e)


def _finished(pipeline: Any) -> Any:
    result = pipeline.run()
    try:
        result.wait_until_finish()
    finally:
        client = getattr(
            result, "client", None
        )  # Dask's runner leaves its client open, and with it a cluster of its own
        if client is not None:
            client.close()
    return result


def _ended(outcome: Future[Any], wait_s: float) -> bool:
    try:
        outcome.exception(timeout=wait_s)
    except TimeoutError:
        return False
    return True


def _workers() -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if _is_worker(process)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any(CLIENT in word for word in process.cmdline())
    except psutil.Error:
        return False


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
