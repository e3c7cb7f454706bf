"""Phases: the one shape of pipeline that distilbeam submits.

A phase is `Create(items) | Reshuffle | ParDo(work)`: linear, without side inputs, tagged outputs or branches (which some
runners drop or repeat silently). A worker takes an item (a unit of the pool or a shard to label), does all the work and
commits one file by rename. The driver is the barrier: it submits only items whose file is missing and afterwards checks
that every file is there, whatever the runner said. A killed phase is therefore repeated where it stopped, and a retried
or duplicated item writes the same bytes again.

An item that fails does not stop its neighbours: the worker writes what happened to the phase's error directory, and the
driver, when the pipeline has ended, tries the missing ones once more before it gives up with the first error's sentence.
An error that every item would meet stops all workers (see `stopping`). A worker process that dies does not hang the job
(see `watchdog`): what it had not committed is tried again. Where work knows what a process died of (`in_danger`), it is done
in worker processes from then on, and what is found out by dying is no attempt.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from threadpoolctl import ThreadpoolController

from distilbeam.pipelines.engine.beam_options import spares_processor, spread_over_tasks
from distilbeam.pipelines.engine.commit_queue import Settler
from distilbeam.pipelines.engine.counters import count, totals
from distilbeam.pipelines.engine.ending import Interrupted, interruptible
from distilbeam.pipelines.engine.failures import (
    are_hopeless,
    clear_failures,
    failure_sentence,
    kept_error,
    read_failures,
)
from distilbeam.pipelines.engine.forkserver import in_processes, local_runner, sheltered
from distilbeam.pipelines.engine.malloc import keep_freed_memory
from distilbeam.pipelines.engine.prefetch import sparing
from distilbeam.pipelines.engine.stopping import (
    is_stopped,
    stoppable,
    write_stop,
)
from distilbeam.pipelines.engine.watchdog import WorkerLostError, run_watched
from distilbeam.progress import Progress
from distilbeam.storage.paths import StoreError, to_path
from distilbeam.storage.private_folders import private_folder

log = logging.getLogger("distilbeam.phases")

Item = TypeVar("Item")
_LOOKS = 50  # times as long as a look at the committed files takes pass until the next


class Work(Protocol[Item]):
    """What a phase does with one item; picklable, and building models only inside `__call__`."""

    def __call__(self, item: Item, /) -> Iterable[Any] | None:
        """Begin the work of `item`, which may be no more than to read ahead.

        Returns:
          What does the rest when it is iterated, after the item before is done, and yields what is to be settled. None
          where everything is done and committed.
        """

    def settle(self, ends: Sequence[Any], /) -> None:
        """Flush and commit what the work on several items yielded, while another thread works on the next item."""

    def remaining(self, items: Sequence[Item], /) -> list[Item]:
        """Return what is not committed of `items`, an item of which a part is without that part.

        Items are looked up together, so that a folder is listed once however many they are.
        """

    def name(self, item: Item, /) -> str:
        """Describe `item` for a reader of an error."""

    def rows(self, item: Item, /) -> int:
        """Return how many rows `item` has."""


@dataclass(frozen=True)
class PhaseReport:
    """What a phase cost in this process.

    Attributes:
      items: items that had to be done.
      seconds: wall time, the runner's start included.
      retried: items that were tried again.
      counts: the meter's totals of the pipelines that ended; empty where the runner keeps no metrics.
    """

    items: int
    seconds: float
    retried: int
    counts: Counter[str]


class PhaseError(RuntimeError):
    """Items of a phase could not be done; the message is a sentence that names the first."""


class _Run(beam.DoFn, Generic[Item]):
    def __init__(self, phase: str, work: Work[Item], errors: str, private: str, *, spare: bool, models: bool) -> None:
        self.phase, self.work, self.errors, self.private = phase, work, errors, private
        self.spare, self.models = spare, models

    def setup(self) -> None:
        keep_freed_memory()

    def start_bundle(self) -> None:
        self.settler = Settler(self.work.settle)
        self.begun: tuple[Item, Iterable[Any]] | None = None

    # One item behind: what is left of an item (`begun`) is done after the next one has been started, whose reading ahead then
    # fills the time in which this one is worked on. A bundle's last item is finished by `finish_bundle`, and Beam counts the
    # elements of a bundle as done only after that.

    def process(self, item: Item) -> None:
        rest: Iterable[Any] | None = None
        with threads(1, models=self.models), self._stoppable():
            if is_stopped():  # what was begun finds out by itself, and keeps what it has
                self._do_begun()
                return
            with self._kept_error(lambda: self.work.name(item)), sparing(self.spare):
                rest = self.work(item) or ()
            self._do_begun()
        self.begun = None if rest is None else (item, rest)

    def finish_bundle(self) -> None:
        with threads(1, models=self.models), self._stoppable():
            self._do_begun()
            with self._kept_error(lambda: "of those that were being flushed to the disk"):
                self.settler.finish()

    def _do_begun(self) -> None:
        if self.begun is None:
            return
        item, rest = self.begun
        self.begun = None  # before the work: what fails must not be begun again by the next item
        with self._kept_error(lambda: self.work.name(item)):
            for end in rest:  # committed by another thread while the next item is worked on: fsync waits for the disk
                self.settler.add(end)
            count(f"{self.phase}_items")

    def _stoppable(self) -> AbstractContextManager[None]:
        return stoppable(to_path(self.errors), Path(self.private))

    def _kept_error(self, name: Callable[[], str]) -> AbstractContextManager[None]:
        return kept_error(name, to_path(self.errors), Path(self.private))


@contextmanager
def threads(count: int, *, models: bool = True) -> Iterator[None]:
    """Keep BLAS and torch to `count` threads inside the block.

    Runners give each worker a core; a pool of BLAS threads in each would make them wait for one another. One thread also
    makes sums, and so gains and labels, the same on every runner.

    Args:
      count: the number of threads.
      models: whether models may run there; without them torch, which takes seconds to import, is left alone.
    """
    # libraries are looked for anew, which takes 2 ms: a model that was loaded in between may have brought one of its own
    with _torch_threads(count) if models else nullcontext(), ThreadpoolController().limit(limits=count):
        yield


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)


def run_phase(
    phase: str,
    work: Work[Item],
    items: Sequence[Item],
    *,
    errors: Path,
    options: PipelineOptions,
    progress: Progress | None = None,
    attempts: int = 2,
    poll_s: float = 0.2,
    models: bool = True,
) -> PhaseReport:
    """Do `work` for every item whose file is missing, as one Beam pipeline.

    Args:
      phase: name of the phase, for step names, metrics and errors.
      work: what to do with an item.
      items: all items of the phase.
      errors: directory for the records of items that failed.
      options: Beam's options; they name the runner.
      progress: told the rows done and all rows, about every `poll_s` seconds.
      attempts: pipelines to submit before an item that fails ends the phase.
      poll_s: seconds between two looks at the committed files.
      models: whether the work runs models, see `threads`.

    Returns:
      What it cost.

    Raises:
      PhaseError: an item failed in every attempt.
      Interrupted: `ending.interrupt` was called.
    """
    start, counts, retried, attempt = time.perf_counter(), Counter[str](), 0, 0
    todo = planned = work.remaining(items)
    with (
        private_folder("errors") as private,
        interruptible(partial(write_stop, (errors, private))) as interrupted,
    ):
        worker = partial(_Run, phase, work, str(errors), str(private), models=models)
        while todo:
            attempt += 1
            clear_failures(errors, private)
            lost, known = "", _dangers(work)
            if known:
                log.warning(
                    "%s: a process died while it asked about rows; a process apart asks about them again", phase
                )
            with _Watch(work, items, progress, poll_s):
                try:
                    counts += _submit(worker, todo, private, sheltered(options) if known else options)
                except WorkerLostError as e:
                    lost = str(e)
                    log.warning("%s: %s", phase, lost)
            todo = work.remaining(todo)  # the files decide what is done, whatever the runner reported
            if interrupted.is_set():
                _tidy(work, finished=False)
                raise Interrupted("stopped; the same command goes on from here")
            failed = read_failures(errors, private)
            if lost and _dangers(work) - known:
                attempt -= 1  # it is known better what the process dies of
            elif todo and (attempt >= attempts or are_hopeless(failed)):
                _tidy(work, finished=False)
                raise PhaseError(failure_sentence(phase, len(todo), work.name(todo[0]), failed, lost))
            if todo:
                log.warning("%s: %d of %d items failed, trying them again", phase, len(todo), len(planned))
                retried += len(todo)
    _tidy(work, finished=True)
    return PhaseReport(len(planned), time.perf_counter() - start, retried, counts)


def _dangers(work: Work[Item]) -> frozenset[Any]:
    """Ask work that knows what processes died of for what is still open; other work knows nothing."""
    dangers: Callable[[], frozenset[Any]] | None = getattr(work, "dangers", None)
    return dangers() if dangers is not None else frozenset()


def _tidy(work: Work[Item], *, finished: bool) -> None:
    """Let work that leaves something beside its results remove it."""
    tidy: Callable[[bool], None] | None = getattr(work, "tidy", None)
    if tidy is not None:
        with suppress(OSError):
            tidy(finished)


def _submit(
    worker: Callable[..., _Run[Item]], todo: Sequence[Item], private: Path, options: PipelineOptions
) -> Counter[str]:
    with spread_over_tasks(options, len(todo)):
        runner, local = local_runner(options) if in_processes(options) else (None, options)
        pipeline = beam.Pipeline(runner, local)
        _keep_inside(pipeline, private)
        run: Any = worker(spare=spares_processor(options))
        # Create would reshuffle, too: a tenth of a second for a second time
        _ = (
            pipeline
            | "Items" >> beam.Create(list(todo), reshuffle=False)
            | beam.Reshuffle()
            | run.phase.capitalize() >> beam.ParDo(run)
        )
        return totals(run_watched(pipeline, options))


def _keep_inside(pipeline: Any, private: Path) -> None:
    """Let Beam's temporary folder be one of ours, which is removed when this process is killed, too."""
    with suppress(OSError):
        Path(pipeline.local_tempdir).rmdir()
    pipeline.local_tempdir = tempfile.mkdtemp(prefix="beam-", dir=private)


class _Watch(Generic[Item]):
    """Report progress from the committed files while a pipeline runs, on any runner that shares the file system."""

    def __init__(self, work: Work[Item], items: Sequence[Item], progress: Progress | None, poll_s: float) -> None:
        self._pending: Sequence[Item] = items
        self._total = sum(work.rows(item) for item in items) if progress is not None else 0
        self._work, self._progress, self._poll_s = work, progress, poll_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        if self._progress is not None:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._stop.set()
            self._thread.join()
            self._report(self._progress)

    def _watch(self) -> None:
        assert self._progress is not None
        wait_s = self._poll_s
        while not self._stop.wait(wait_s):
            start = time.perf_counter()
            with suppress(StoreError):  # the next look will tell
                self._report(self._progress)
            # a look lists every file that is committed, which may not take the work's time
            wait_s = max(self._poll_s, _LOOKS * (time.perf_counter() - start))

    def _report(self, progress: Progress) -> None:
        self._pending = self._work.remaining(self._pending)
        progress.step(self._total - sum(self._work.rows(item) for item in self._pending), self._total)
