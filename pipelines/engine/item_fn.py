"""The DoFn of a phase: does the items of a share one after the other, reading one ahead, committing one behind.

A pipeline's elements are shares, tuples of items: one item where a runner spreads elements over its workers by itself, all
that a worker is to do where it does not (see `submission`).

What the DoFn has begun in this process is known here (`open_shares`), so that it can be brought to an end when the engine that
asked for it is gone: what the teacher has answered is kept, and nothing of it goes on beside the next submission.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import apache_beam as beam
from threadpoolctl import ThreadpoolController

from distilbeam.pipelines.engine.commit_queue import Settler
from distilbeam.pipelines.engine.counters import count
from distilbeam.pipelines.engine.failures import kept_error
from distilbeam.pipelines.engine.malloc import keep_freed_memory
from distilbeam.pipelines.engine.prefetch import sparing
from distilbeam.pipelines.engine.stopping import is_stopped, stop_process, stoppable
from distilbeam.storage.paths import to_path

Item = TypeVar("Item")
_open: set[DoItems[Any]] = set()  # bundles of this process that have begun and not ended
_POLL_S = 0.02


@dataclass(frozen=True)
class Submission:
    """What the workers of one submission of a phase share with the driver.

    Attributes:
      phase: the phase.
      errors: its directory of errors, which other machines see.
      private: the driver's own folder.
      token: names the submission; the word to stop is said to one submission and stays said, so that a worker that comes
        back late does not take up what others are doing.
    """

    phase: str
    errors: str
    private: str
    token: str

    @property
    def stop_files(self) -> tuple[Path, Path]:
        """The files whose presence says to stop."""
        return to_path(self.errors) / f"stop-{self.token}", Path(self.private) / f"stop-{self.token}"


class DoItems(beam.DoFn, Generic[Item]):
    """Does the items of shares.

    Args:
      submission: what it belongs to.
      work: what to do with an item, see `phase.Work`.
      spare: whether a processor is idle, so that reading ahead pays.
      models: whether the work runs models.
    """

    def __init__(self, submission: Submission, work: Any, *, spare: bool, models: bool) -> None:
        self.submission, self.work = submission, work
        self.spare, self.models = spare, models

    def setup(self) -> None:
        """Have freed memory kept for the next item."""
        keep_freed_memory()

    def start_bundle(self) -> None:
        """Begin a bundle."""
        self.settler = Settler(self.work.settle)
        self.begun: tuple[Item, Iterable[Any]] | None = None
        self.at_work = threading.Lock()
        _open.add(self)

    # One item behind: what is left of an item (`begun`) is done after the next one has been started, whose reading ahead then
    # fills the time in which this one is worked on. A bundle's last item is finished by `finish_bundle`, and Beam counts the
    # elements of a bundle as done only after that.

    def process(self, share: Sequence[Item]) -> None:
        """Do the items of a share."""
        with self.at_work, threads(1, models=self.models), self._stoppable():
            for item in share:
                self._begin(item)

    def _begin(self, item: Item) -> None:
        if is_stopped():  # what was begun finds out by itself, and keeps what it has
            self._do_begun()
            return
        rest: Iterable[Any] | None = None
        with self._kept_error(lambda: self.work.name(item)), sparing(self.spare):
            rest = self.work(item) or ()
        self._do_begun()
        self.begun = None if rest is None else (item, rest)

    def finish_bundle(self) -> None:
        """Finish what was begun, and wait until everything is committed."""
        with self.at_work, threads(1, models=self.models), self._stoppable():
            self._do_begun()
            with self._kept_error(lambda: "of those that were being flushed to the disk"):
                self.settler.finish()
        _open.discard(self)

    def _do_begun(self) -> None:
        if self.begun is None:
            return
        item, rest = self.begun
        self.begun = None  # before the work: what fails must not be begun again by the next item
        with self._kept_error(lambda: self.work.name(item)):
            for end in rest:  # committed by another thread while the next item is worked on: fsync waits for the disk
                self.settler.add(end)
            count(f"{self.submission.phase}_items")

    def _stoppable(self) -> AbstractContextManager[None]:
        return stoppable(*self.submission.stop_files)

    def _kept_error(self, name: Callable[[], str]) -> AbstractContextManager[None]:
        return kept_error(name, to_path(self.submission.errors), Path(self.submission.private))


def end_open_bundles(patience_s: float, token: str | None = None) -> bool:
    """Bring the bundles of this process to their end, of which an engine that is gone will not: what they have is kept.

    Whoever calls has said to stop, so that none of them asks for more.

    Args:
      patience_s: seconds to wait for requests in flight.
      token: of the submission; None for all.

    Returns:
      Whether all have ended.
    """
    end = time.monotonic() + patience_s
    while bundles := [bundle for bundle in list(_open) if token in (None, bundle.submission.token)]:
        for bundle in bundles:
            if bundle.at_work.acquire(timeout=_POLL_S):  # else the harness's own thread is at it
                bundle.at_work.release()
                bundle.finish_bundle()
        if time.monotonic() > end:
            return False
    return True


def end_process_work(patience_s: float) -> None:
    """Let a worker process end without losing what was answered: it asks no more, and commits or saves what it has."""
    stop_process()
    end_open_bundles(patience_s)


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
