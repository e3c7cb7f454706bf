"""Phases: the one shape of pipeline that distilbeam submits.

A phase is `Create(items) | Reshuffle | ParDo(work)`: linear, without side inputs, tagged outputs or branches (which some
runners drop or repeat silently). A worker takes an item (a unit of the pool or a shard to label), does all the work and
commits one file by rename. The driver is the barrier: it submits only items whose file is missing and afterwards checks
that every file is there, whatever the runner said. A killed phase is therefore repeated where it stopped, and a retried
or duplicated item writes the same bytes again.

An item that fails does not stop its neighbours: the worker writes what happened to the phase's error directory, and the
driver, when the pipeline has ended, tries the missing ones once more before it gives up with the first error's sentence.
A worker process that dies does not hang the job (see `watchdog`): what it had not committed is tried again.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import apache_beam as beam
import torch
from apache_beam.metrics import Metrics
from apache_beam.options.pipeline_options import PipelineOptions
from threadpoolctl import ThreadpoolController

from distilbeam.pipelines.files import read_json, write_json
from distilbeam.pipelines.watchdog import WorkerLostError, run_watched

log = logging.getLogger("distilbeam.phases")

Item = TypeVar("Item")
Item_contra = TypeVar("Item_contra", contravariant=True)


class Work(Protocol[Item_contra]):
    """What a phase does with one item; picklable, and building models only inside `__call__`."""

    def __call__(self, item: Item_contra, /) -> None:
        """Do the work of `item` and commit its file."""

    def done(self, item: Item_contra, /) -> bool:
        """Tell whether the file of `item` is committed."""

    def name(self, item: Item_contra, /) -> str:
        """Describe `item` for a reader of an error."""


class PhaseError(RuntimeError):
    """Items of a phase could not be done; the message is a sentence that names the first."""


class _Run(beam.DoFn, Generic[Item]):
    def __init__(self, phase: str, work: Work[Item], errors: str) -> None:
        self.phase, self.work, self.errors = phase, work, errors
        self.items_done = Metrics.counter("distilbeam", f"{phase}_items")

    def process(self, item: Item) -> None:
        try:
            with threads(1):
                self.work(item)
            self.items_done.inc()
        except Exception as e:  # noqa: BLE001  # the boundary: the driver reads it and raises it
            record = {
                "item": self.work.name(item),
                "type": type(e).__name__,
                "message": str(e),
                "traceback": traceback.format_exc(),
            }
            write_json(Path(self.errors) / f"{_stable_name(self.work.name(item))}.json", record)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Keep BLAS and torch to `count` threads inside the block.

    Runners give each worker a core; a pool of BLAS threads in each would make them wait for one another. One thread also
    makes sums, and so gains and labels, the same on every runner.
    """
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        with _thread_pools(len(sys.modules)).limit(limits=count):
            yield
    finally:
        if before != count:
            torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _thread_pools(_modules: int) -> ThreadpoolController:
    """Find the loaded BLAS and OpenMP libraries, again only when something was imported: it takes milliseconds."""
    return ThreadpoolController()


def run_phase(
    phase: str,
    work: Work[Item],
    items: Sequence[Item],
    *,
    errors: Path,
    options: PipelineOptions,
    progress: Callable[[int, int], None] | None = None,
    attempts: int = 2,
    poll_s: float = 0.2,
) -> int:
    """Do `work` for every item whose file is missing, as one Beam pipeline.

    Args:
      phase: name of the phase, for step names, metrics and errors.
      work: what to do with an item.
      items: all items of the phase.
      errors: directory for the records of items that failed.
      options: Beam's options; they name the runner.
      progress: called about every `poll_s` seconds with the number of items done and of all items.
      attempts: pipelines to submit before an item that fails ends the phase.
      poll_s: seconds between two looks at the committed files.

    Returns:
      The number of items that had to be done.

    Raises:
      PhaseError: an item failed in every attempt.
    """
    todo = planned = [item for item in items if not work.done(item)]
    for attempt in range(1, attempts + 1):
        if not todo:
            break
        shutil.rmtree(errors, ignore_errors=True)
        lost = ""
        with _Watch(work, items, progress, poll_s):
            try:
                _submit(phase, work, todo, errors, options)
            except WorkerLostError as e:
                lost = str(e)
                log.warning("%s: %s", phase, lost)
        todo = [item for item in todo if not work.done(item)]
        failed = _failures(errors)
        if todo and (
            attempt == attempts
            or (all(f["type"] in ("ValueError", "TypeError", "KeyError") for f in failed) and failed)
        ):
            raise PhaseError(_sentence(phase, todo, failed, work, lost))
        if todo:
            log.warning("%s: %d of %d items failed, trying them again", phase, len(todo), len(planned))
    if progress is not None:
        progress(len(items), len(items))
    return len(planned)


def _submit(phase: str, work: Work[Item], todo: Sequence[Item], errors: Path, options: PipelineOptions) -> None:
    pipeline = beam.Pipeline(options=options)
    run: Any = _Run(phase, work, str(errors))
    _ = pipeline | "Items" >> beam.Create(list(todo)) | beam.Reshuffle() | phase.capitalize() >> beam.ParDo(run)
    run_watched(pipeline, options)


class _Watch(Generic[Item]):
    """Report progress from the committed files while a pipeline runs, on any runner that shares the file system."""

    def __init__(
        self, work: Work[Item], items: Sequence[Item], progress: Callable[[int, int], None] | None, poll_s: float
    ) -> None:
        self._pending = list(items)
        self._total, self._work, self._progress, self._poll_s = len(items), work, progress, poll_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> None:
        if self._progress is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._progress is not None:
            self._thread.join()

    def _report(self) -> None:
        assert self._progress is not None
        while not self._stop.wait(self._poll_s):
            self._pending = [item for item in self._pending if not self._work.done(item)]
            self._progress(self._total - len(self._pending), self._total)


def _failures(errors: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted(errors.glob("*.json"))]


def _sentence(phase: str, todo: Sequence[Item], failed: Sequence[dict[str, Any]], work: Work[Item], lost: str) -> str:
    count = f"{phase}: {len(todo)} item(s) could not be done"
    if lost and not failed:
        return f"{count}, the first {work.name(todo[0])}: {lost}; give workers less to hold (engine.batch_rows, engine.shard_rows) or more memory"
    if not failed:
        return f"{count} although the runner reported success, the first {work.name(todo[0])}; run the same command again to repeat them"
    first = failed[0]
    log.debug("first failure of %s:\n%s", phase, first["traceback"])
    message = first["message"] if first["type"] == "ValueError" else f"{first['type']}: {first['message']}"
    return f"{count}, the first {first['item']}: {message}"


def _stable_name(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
