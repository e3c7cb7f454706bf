"""A watchdog for pipelines whose runner ends too early, or waits for ever when one of its worker processes dies.

Beam's FnApiRunner with `--direct_running_mode=multi_processing` starts worker processes and does not notice when one of
them is killed, by the kernel for want of memory, say: the job hangs. Here the pipeline runs in a thread of its own; when a
worker process has been gone for a while and the pipeline is still not at its end, the other workers are ended, the pipeline
is given up, and the caller decides what to repeat. Nothing is lost: what was committed is committed. Runners elsewhere (Prism,
Dask, Flink) say that they failed, or are gone without a word; they are waited for in threads, so that Ctrl-C is heard meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from typing import Any

import psutil
from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines.engine.ending import ended_with_process, give_up, interrupt_passed_over
from distilbeam.pipelines.engine.engine_lines import first_line
from distilbeam.pipelines.engine.forkserver import CLIENT, LOCAL_RUNNER, deaths, in_processes

_FIRST_LOOK_S = 0.02  # a worker may die at once
_LOOK_S = 0.5  # between two chances for a signal's handler
_CONNECTIONS = ("beam_control_read", "read_grpc_client_inputs", "run_worker")  # Beam's threads, by name
_hooks: list[Any] = []


class WorkerLostError(RuntimeError):
    """A worker process ended while the pipeline needed it."""


class EngineLostError(RuntimeError):
    """A runner elsewhere ended before the pipeline's work was done; the message is what it said."""


def run_watched(
    pipelines: Sequence[Any], options: PipelineOptions, *, grace_s: float = 5.0, poll_s: float = 0.5
) -> list[Any]:
    """Run pipelines to their end, beside one another where the runner is elsewhere.

    Args:
      pipelines: the Beam pipelines.
      options: their options; of the local runner the multi-processing mode is watched.
      grace_s: seconds that a pipeline may go on after a worker has ended, as it does at the end of a normal run.
      poll_s: seconds between two looks at the workers.

    Returns:
      The pipelines' results.

    Raises:
      WorkerLostError: a worker process died.
      EngineLostError: a runner elsewhere failed, or does not answer any more.
      Exception: whatever the local runner raises, or another one before it has begun for want of an option.
    """
    if in_processes(options):
        return [_run_processes(pipeline, grace_s, poll_s) for pipeline in pipelines]
    if options.get_all_options().get("runner") == LOCAL_RUNNER:
        return [_finished(pipeline) for pipeline in pipelines]
    return _run_elsewhere(pipelines)


def _run_elsewhere(pipelines: Sequence[Any]) -> list[Any]:
    """Submit pipelines from this thread, which Beam needs for signal handlers of its own, and wait where Ctrl-C is seen."""
    results: list[Any] = []
    try:
        with interrupt_passed_over(), ExitStack() as stack:
            for pipeline in pipelines:
                results.append(pipeline.run())
                stack.enter_context(ended_with_process(partial(_cancel, results[-1])))
            ends = stack.pop_all()
    except (ValueError, TypeError, NotImplementedError, ImportError):
        raise
    except Exception as e:
        raise EngineLostError(first_line(e)) from e
    outcomes = [Future[Any]() for _ in results]
    with ends:
        for result, outcome in zip(results, outcomes, strict=True):
            threading.Thread(target=_resolve, args=(partial(_awaited, result), outcome), daemon=True).start()
        for outcome in outcomes:
            while not _ended(outcome, _LOOK_S):
                pass
    if (error := next(filter(None, (outcome.exception() for outcome in outcomes)), None)) is not None:
        raise EngineLostError(first_line(error)) from error
    return results


def _cancel(result: Any) -> None:
    result.cancel()


def _run_processes(pipeline: Any, grace_s: float, poll_s: float) -> Any:
    _silence_connections()
    outcome: Future[Any] = Future()
    threading.Thread(target=_resolve, args=(partial(_finished, pipeline), outcome), daemon=True).start()
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


def _resolve(work: Callable[[], Any], outcome: Future[Any]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as e:  # noqa: BLE001  # the caller raises it
        outcome.set_exception(e)


def _finished(pipeline: Any) -> Any:
    return _awaited(pipeline.run())


def _awaited(result: Any) -> Any:
    try:
        result.wait_until_finish()
    finally:
        client = getattr(result, "client", None)  # Dask's runner leaves it open, and with it a cluster of its own
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
