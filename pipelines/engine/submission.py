"""One submission of a phase: its pipeline is built, an engine is started where that is ours to do, and the end is awaited.

`Create(shares) | Reshuffle | ParDo(items)`. Runners that spread elements over workers get one item in each share. Prism gives a
job one worker and all elements in one bundle, which it cuts in two whenever nothing has come for a tenth of a second, to run
the halves side by side in that one worker; it gets all that a worker is to do as one element, and a job for each worker
(`--sdk_worker_parallelism`). There something comes behind the ParDo, which yields nothing: while a bundle of a
stage without an output is at work, Prism asks without a pause whether it is over, and takes a processor from the workers.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions

from distilbeam.pipelines.engine.beam_options import spares_processor, spread_over_tasks
from distilbeam.pipelines.engine.counters import totals
from distilbeam.pipelines.engine.forkserver import in_processes, local_runner
from distilbeam.pipelines.engine.item_fn import DoItems, Submission, end_open_bundles
from distilbeam.pipelines.engine.prism import PrismNotStartedError, on_prism, prism_of, running, workers_of
from distilbeam.pipelines.engine.stopping import write_stop
from distilbeam.pipelines.engine.watchdog import EngineLostError, run_watched

Item = TypeVar("Item")
PATIENCE_S = 30.0  # for requests in flight when an engine is gone
_LOOK_S = 0.1
_ANSWER_S = 5.0


def submit(
    submission: Submission, work: Any, todo: Sequence[Item], options: PipelineOptions, log: Path, *, models: bool
) -> Counter[str]:
    """Run the pipeline once.

    Args:
      submission: what it shares with its workers.
      work: what to do with an item.
      todo: the items.
      options: Beam's options; they name the runner.
      log: where the lines of an engine that is started here go.
      models: whether the work runs models.

    Returns:
      The totals of its counters.

    Raises:
      WorkerLostError: a worker process died.
      EngineLostError: a runner elsewhere ended before the work was done, or did not start.
    """
    with spread_over_tasks(options, len(todo)), _started(options, log) as (runner, local):
        do: DoItems[Item] = DoItems(submission, work, spare=spares_processor(options), models=models)
        shares: list[list[tuple[Item, ...]]] = [[(item,) for item in todo]]
        prism = prism_of(options) is not None
        if prism:
            workers = min(len(todo), workers_of(options))
            shares = [[tuple(todo[first::workers])] for first in range(workers)]
        pipelines = [_pipeline(submission, do, share, runner, local, has_end=prism) for share in shares]
        return sum((totals(result) for result in run_watched(pipelines, options)), Counter())


def give_up(submission: Submission, work: Any) -> None:
    """Have the workers of a submission stop, and wait until they have kept what they were answered."""
    write_stop(submission.stop_files)
    end_open_bundles(PATIENCE_S, submission.token)
    at_work = getattr(work, "at_work", None)  # work that knows of other processes whether they are at it
    end = time.monotonic() + PATIENCE_S
    while at_work is not None and at_work() and time.monotonic() < end:
        time.sleep(_LOOK_S)


def _pipeline(
    submission: Submission, do: DoItems[Item], shares: Sequence[Any], runner: Any, options: Any, *, has_end: bool
) -> Any:
    pipeline = beam.Pipeline(runner, options)
    _keep_inside(pipeline, Path(submission.private))
    # Create would reshuffle, too: a tenth of a second for a second time
    items = pipeline | "Items" >> beam.Create(shares, reshuffle=False)
    if len(shares) > 1:
        items = items | beam.Reshuffle()
    done = items | submission.phase.capitalize() >> beam.ParDo(do)
    if has_end:
        _ = done | "End" >> beam.Reshuffle() | "Nothing" >> beam.Map(_nothing)
    return pipeline


@contextmanager
def _started(options: PipelineOptions, log: Path) -> Iterator[tuple[Any, PipelineOptions]]:
    """Start what a runner needs until the block ends; yield the runner, None where Beam finds it, and the options for it."""
    program = prism_of(options)
    if in_processes(options):
        yield local_runner(options)
    elif program is None:
        yield None, options
    else:
        with ExitStack() as stack:
            try:
                address = stack.enter_context(running(program, log))
            except PrismNotStartedError as e:
                raise EngineLostError(f"Prism did not start: {e.how}") from e
            _require_pool(options.view_as(PortableOptions))
            yield None, on_prism(options, address)


def _require_pool(portable: Any) -> None:
    """Look whether the workers' pool answers; Prism would wait for a minute before it says that nobody came.

    Raises:
      EngineLostError: it does not.
    """
    if portable.environment_type != "EXTERNAL":
        return
    host, _, port = str(portable.environment_config).rpartition(":")
    try:
        socket.create_connection((host, int(port)), _ANSWER_S).close()
    except (OSError, ValueError) as e:
        raise EngineLostError(
            f"no worker pool answers at --environment_config={portable.environment_config}; 'distilbeam workers' starts one"
        ) from e


def _keep_inside(pipeline: Any, private: Path) -> None:
    """Let Beam's temporary folder be one of ours, which is removed when this process is killed, too."""
    with suppress(OSError):
        Path(pipeline.local_tempdir).rmdir()
    pipeline.local_tempdir = tempfile.mkdtemp(prefix="beam-", dir=private)


def _nothing(_: Any) -> None:
    """Take what never comes."""
