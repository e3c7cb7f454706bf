"""Phases: the one shape of pipeline that distilbeam submits.

A phase is `Create(items) | Reshuffle | ParDo(work)`: linear, without side inputs, tagged outputs or branches (which some
runners drop or repeat silently). A worker takes an item (a unit of the pool or a shard to label), does all the work and
commits one file by rename. The driver is the barrier: it submits only items whose file is missing and afterwards checks
that every file is there, whatever the runner said. A killed phase is therefore repeated where it stopped, and a retried
or duplicated item writes the same bytes again.

An item that fails does not stop its neighbours: the worker writes what happened to the phase's error directory, and the
driver, when the pipeline has ended, tries the missing ones once more before it gives up with the first error's sentence.
An error that every item would meet stops all workers (see `stopping`). An engine or a worker process that dies does not hang
the job (see `watchdog`): its workers keep what they were answered, and the phase is submitted again for what is left, as long as
each time more of it is done. Where work knows what a process died of (`dangers`), it is done in worker processes from then on, and
what is found out by dying is no attempt.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines.engine.ending import Interrupted, interruptible
from distilbeam.pipelines.engine.engine_lines import engine_lines, lines_are_in
from distilbeam.pipelines.engine.failures import are_hopeless, clear_failures, failure_sentence, read_failures
from distilbeam.pipelines.engine.forkserver import LOCAL_RUNNER, in_processes, sheltered
from distilbeam.pipelines.engine.item_fn import Submission, threads
from distilbeam.pipelines.engine.stopping import write_stop
from distilbeam.pipelines.engine.submission import give_up, submit
from distilbeam.pipelines.engine.watchdog import EngineLostError, WorkerLostError
from distilbeam.progress import Progress
from distilbeam.storage.paths import StoreError, is_remote, remove_folder
from distilbeam.storage.private_folders import PREFIX, private_folder

__all__ = ["PhaseError", "PhaseReport", "Work", "run_phase", "threads"]
log = logging.getLogger("distilbeam.phases")

Item = TypeVar("Item")
_PAUSE_S = 0.5  # after a loss: what ended the engine may end the next one, too, if it comes at once
MOST_LOSSES = 10  # of engines or workers in one phase, though each time more of it was done
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
    engine_log: Path | None = None,
) -> PhaseReport:
    """Do `work` for every item whose file is missing, as one Beam pipeline.

    Args:
      phase: name of the phase, for step names, metrics and errors.
      work: what to do with an item.
      items: all items of the phase.
      errors: directory for the records of items that failed.
      options: Beam's options; they name the runner.
      progress: told the rows done and all rows, about every `poll_s` seconds.
      attempts: pipelines that are submitted and do nothing more of it before the phase ends with an error.
      poll_s: seconds between two looks at the committed files.
      models: whether the work runs models, see `threads`.
      engine_log: file for the lines of a runner elsewhere and of Beam about it; a temporary one by default.

    Returns:
      What it cost.

    Raises:
      PhaseError: an item failed in every attempt, or engine or workers died again and again.
      Interrupted: `ending.interrupt` was called.
    """
    start, todo = time.perf_counter(), work.remaining(items)
    planned = todo
    if todo:  # a look into a store is a request
        remove_folder(errors)
    with private_folder("errors") as private:
        if options.get_all_options().get("runner") == LOCAL_RUNNER and not in_processes(options):
            engine_log = None  # there is nobody but this process
        elif engine_log is None or is_remote(engine_log):
            engine_log = Path(tempfile.gettempdir()) / f"{PREFIX}engine-{os.getpid()}.log"
        tries = _Tries(phase, work, options, (errors, private), attempts, engine_log, models)
        with engine_lines(engine_log), interruptible(tries.stop) as interrupted:
            while todo:
                with _Watch(work, items, progress, poll_s):
                    tries.submit(todo, interrupted)
                before, todo = todo, work.remaining(todo)  # the files decide what is done, whatever the runner reported
                if interrupted.is_set():
                    _tidy(work, finished=False)
                    raise Interrupted(f"stopped; the same command goes on from here{lines_are_in(engine_log)}")
                if todo:
                    tries.require_another(before, todo, planned)
    _tidy(work, finished=True)
    if tries.retried:
        remove_folder(errors)
    return PhaseReport(len(planned), time.perf_counter() - start, tries.retried, tries.counts)


class _Tries(Generic[Item]):
    """The submissions of a phase: what they cost, and whether there is another one."""

    def __init__(
        self,
        phase: str,
        work: Work[Item],
        options: PipelineOptions,
        places: tuple[Path, Path],
        attempts: int,
        engine_log: Path | None,
        models: bool,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.retried = 0
        self._phase, self._work, self._options, self._places = phase, work, options, places
        self._left, self._attempts, self._losses = attempts, attempts, 0
        self._engine_log, self._models = engine_log, models
        self._current = self._next()

    def stop(self) -> None:
        """Tell the workers to keep what they have, and to stop."""
        write_stop(self._current.stop_files)

    def submit(self, todo: Sequence[Item], interrupted: threading.Event) -> None:
        """Submit what is to be done, and wait for the end."""
        self._lost, self._dangers, work = "", _dangers(self._work), self._work
        options = self._options
        if self._dangers:
            log.warning(
                "%s: a process died while it asked about rows; a process apart asks about them again", self._phase
            )
            options = sheltered(options)
        self._current = self._next()
        if interrupted.is_set():  # between two submissions: the former one was told
            return
        engine_log = self._engine_log or self._places[1] / "engine.log"
        try:
            self.counts += submit(self._current, work, todo, options, engine_log, models=self._models)
        except (WorkerLostError, EngineLostError) as e:
            self._lost = str(e)
            give_up(self._current, work)

    def require_another(self, before: Sequence[Item], todo: Sequence[Item], planned: Sequence[Item]) -> None:
        """Prepare another submission, for what is left.

        Raises:
          PhaseError: there is none.
        """
        work, failed = self._work, read_failures(*self._places)
        left, lines = _rows(work, todo), lines_are_in(self._engine_log)
        self._losses += bool(self._lost)
        if not (self._lost and (_dangers(work) - self._dangers or left < _rows(work, before))):
            self._left -= 1  # nothing is known better, nothing was done
        if not self._left or self._losses > MOST_LOSSES or are_hopeless(failed):
            _tidy(work, finished=False)
            sentence = failure_sentence(self._phase, len(todo), work.name(todo[0]), failed, self._lost)
            if self._lost:
                done = _rows(work, planned) - left
                sentence += f"; {done:,} rows are done and {left:,} are left, the same command goes on with them{lines}"
            raise PhaseError(sentence)
        if self._lost:
            log.warning("%s: %s; it is submitted again for what is left%s", self._phase, self._lost, lines)
            time.sleep(_PAUSE_S)
        else:
            log.warning("%s: %d of %d items failed, trying them again", self._phase, len(todo), len(planned))
        self.retried += len(todo)
        clear_failures(*self._places)

    def _next(self) -> Submission:
        errors, private = map(str, self._places)
        return Submission(self._phase, errors, private, secrets.token_hex(4))


def _rows(work: Work[Item], items: Sequence[Item]) -> int:
    return sum(work.rows(item) for item in items)


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


class _Watch(Generic[Item]):
    """Report progress from the committed files while a pipeline runs, on any runner that shares the file system."""

    def __init__(self, work: Work[Item], items: Sequence[Item], progress: Progress | None, poll_s: float) -> None:
        self._pending: Sequence[Item] = items
        self._total = _rows(work, items) if progress is not None else 0
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
        progress.step(self._total - _rows(self._work, self._pending), self._total)
