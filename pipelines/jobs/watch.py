"""A watched directory: files are looked for, frozen into windows and labelled, until the job is told to end.

    look ──▶ whole new files ──▶ a window closes (time, number of files) ──▶ journal ──▶ phases ──▶ done ──▶ look ...

The job's directory holds everything: `windows/` (journals), `labels/` (one soft-label dataset; every manifest entry names its
window), `deadletter/window=000000/`, and `watch.json`, what the job was started with. After a kill the same command first
carries out the windows that were frozen and goes on looking.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.engine.model_cache import cached_student
from distilbeam.pipelines.jobs.labelling import LabellingJob
from distilbeam.pipelines.jobs.opening import require_apart
from distilbeam.pipelines.jobs.watch_files import Arrival, Arrivals, PassedOver
from distilbeam.pipelines.jobs.watch_journal import Journal, Window
from distilbeam.pipelines.jobs.watch_window import LostFileError, WindowWork
from distilbeam.pipelines.pool.reserved_names import require_free_names
from distilbeam.storage.files import read_json, write_json
from distilbeam.teacher.softlabels import compact_manifest

log = logging.getLogger("distilbeam.watch")

_COMPACT_EVERY = 256  # windows after which the manifest's entries are gathered in one file


@dataclass
class _Open:
    """The window that is being filled."""

    files: list[Arrival] = field(default_factory=list)
    passed_over: list[PassedOver] = field(default_factory=list)
    since: float = 0.0


def watch(job: LabellingJob, directory: Path, options: PipelineOptions, display: Display) -> dict[str, Any]:
    """Label the files that arrive in a directory until a stop file, a number of windows or idle time ends it.

    Args:
      job: the labelling job; its directory is held by this process.
      directory: where Parquet files arrive.
      options: Beam's options for the phases.
      display: where to show progress.

    Returns:
      Totals of all windows, also of earlier calls: windows, files, rows, wanted, labelled, failed, passed_over; and
      `unreadable`, names of files that never became whole.

    Raises:
      ValueError: the directory does not exist, or the job was started with something else; when it has ended, that a file
        was lost in the middle of a window, which then waits for it.
      PhaseError: work that failed in every attempt; the same command goes on from there.
    """
    if not directory.is_dir():
        raise ValueError(f"--watch must name a directory, got {directory}; make it before anything arrives in it")
    require_apart(job.directory.root, directory, "--watch")
    watcher = _Watcher(job, directory.resolve(), options, display)
    why = watcher.run()
    display.say(f"Ended: {why}")
    if watcher.problems:
        more = f" ({len(watcher.problems) - 1} more such windows)" if len(watcher.problems) > 1 else ""
        raise ValueError(f"{watcher.problems[0]}{more}; everything else is labelled")
    return watcher.totals()


class _Watcher:
    def __init__(self, job: LabellingJob, directory: Path, options: PipelineOptions, display: Display) -> None:
        self.settings, self.display, self.job, self.directory = job.config.watch, display, job, directory
        self.journal = Journal(job.directory.root / "windows")
        self.work = WindowWork(job, directory, options)
        self.types = _Frozen(job, self.work, directory, bool(self.journal.windows))
        self.problems: list[str] = []
        self.arrivals = Arrivals(directory, self.settings.settle_s, self.types.problem, columns=self.types.columns)
        for window in self.journal:
            self.arrivals.remember((*window.files, *window.passed_over))
        self.window = _Open()
        self.done_now = 0

    def run(self) -> str:
        """Watch until something ends it; return what did."""
        for window in self.journal.unfinished():
            self._label(window)
        self.display.say(f"Watching {self.directory}; a file {self._stop_file.name} in it ends this")
        quiet_since = time.monotonic()
        while True:
            stopping = self._stop_file.exists()
            if self._look():
                quiet_since = time.monotonic()
            if self.window.files and (stopping or self._full()) and not (stopping and self.arrivals.unsettled):
                self._close()
                quiet_since = time.monotonic()
            if (why := self._ending(stopping, quiet_since)) is not None:
                return why
            time.sleep(self.settings.poll_s)

    def totals(self) -> dict[str, Any]:
        """Add up all windows."""
        summaries = list(self.journal.summaries())
        totals: dict[str, Any] = {
            name: sum(summary[name] for summary in summaries) for name in ("rows", "wanted", "labelled", "failed")
        }
        files = sum(len(window.files) for window in self.journal)
        passed_over = sum(len(window.passed_over) for window in self.journal) + len(self.window.passed_over)
        unreadable = sorted(self.arrivals.unreadable)
        return {
            "windows": len(summaries),
            "files": files,
            **totals,
            "passed_over": passed_over,
            "unreadable": unreadable,
        }

    @property
    def _stop_file(self) -> Path:
        return self.directory / self.settings.stop_file

    def _look(self) -> bool:
        """Take what became whole; tell whether anything did."""
        taken, passed_over = self.arrivals.look()
        for file in passed_over:
            log.warning("%s is not labelled: %s", file.name, file.why)
        if taken and not self.window.files:
            self.window.since = time.monotonic()
        self.window.files += taken
        self.window.passed_over += passed_over
        return bool(taken)

    def _full(self) -> bool:
        waited = time.monotonic() - self.window.since
        return waited >= self.settings.window_s or len(self.window.files) >= self.settings.window_files

    def _close(self) -> None:
        """Freeze the window's files and label them; what is beyond `window_files` waits for the next window."""
        files = self.window.files[: self.settings.window_files]
        window = Window(
            len(self.journal.windows),
            self.journal.rows,
            tuple(files),
            tuple(self.window.passed_over),
            self.settings.budget,
        )
        self.journal.freeze(window)
        self.window = _Open(self.window.files[len(files) :], since=self.window.since)
        self._label(window)

    def _label(self, window: Window) -> None:
        self.done_now += 1
        try:
            window = self.work.without_lost(window)
            self.journal.change(window)
            with self.display.step(
                f"window {window.number}: {window.rows:,} rows in {len(window.files)} file(s)"
            ) as progress:
                summary = self.work.do(window, progress)
        except LostFileError as e:  # later files are none the worse for it
            self.problems.append(str(e))
            log.warning("%s", e)
            return
        if window.number % _COMPACT_EVERY == _COMPACT_EVERY - 1:
            compact_manifest(self.job.dataset)
        self.journal.finish(window, summary)

    def _ending(self, stopping: bool, quiet_since: float) -> str | None:
        settings = self.settings
        if settings.windows is not None and self.done_now >= settings.windows:
            return f"{self.done_now} window(s) done"
        if self.window.files or (stopping and self.arrivals.unsettled):
            return None
        if stopping:
            self._stop_file.unlink(missing_ok=True)
            return f"{self._stop_file.name} was there; it is removed"
        if settings.idle_s is not None and time.monotonic() - quiet_since >= settings.idle_s:
            return f"nothing came for {settings.idle_s:g} s"
        return None


class _Frozen:
    """What the job was started with, in `watch.json`: teacher, form of labels, student, types of the columns."""

    def __init__(self, job: LabellingJob, work: WindowWork, directory: Path, begun: bool) -> None:
        self._path = job.directory.root / "watch.json"
        student = None if job.config.watch.student is None else cached_student(work.student).fingerprint()
        now = {
            "directory": str(directory),
            "labels": job.spec.meaning(),
            "teacher": job.spec.teacher,
            "student": student,
        }
        columns = [*job.columns, *(work.student_columns() if student else ())]
        if student:
            require_free_names(work.student_columns(), "watch.student")
        self.columns = tuple(dict.fromkeys(columns))
        if not self._path.exists():
            if begun or any((job.dataset / "_manifest").glob("*.json*")):
                raise ValueError(
                    f"{job.dataset} holds labels that no watch made; choose another directory with --set run.directory=..."
                )
            write_json(self._path, {**now, "types": {}})
        self._then = read_json(self._path)
        for name, value in now.items():
            if self._then[name] != value:
                raise ValueError(
                    f"{name} changed: {job.directory.root} was started with {self._then[name]}, got {value}; put it back "
                    "or choose another directory with --set run.directory=..."
                )

    def problem(self, schema: pa.Schema) -> str:
        """Say what is wrong with a file's schema; the first file decides the types."""
        missing = [name for name in self.columns if name not in schema.names]
        if missing:
            return f"it has no column {missing[0]}"
        found = {name: str(schema.field(name).type) for name in self.columns}
        if not self._then["types"]:
            self._then["types"] = found
            write_json(self._path, self._then)
        for name, type_ in found.items():
            if type_ != self._then["types"].get(name):
                return f"its column {name} is {type_}, not {self._then['types'].get(name)}"
        return ""
