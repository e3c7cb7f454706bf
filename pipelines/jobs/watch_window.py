"""The phases of one window: choose within its budget, where there is one, and label."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines.acquisition.score import Score
from distilbeam.pipelines.acquisition.select import Choice, choose
from distilbeam.pipelines.acquisition.unusable_rows import gather_unusable, unusable_list, unusable_sentence
from distilbeam.pipelines.engine.model_cache import cached_student
from distilbeam.pipelines.jobs.labelling import LabellingJob
from distilbeam.pipelines.jobs.recorded_phases import RecordedPhases
from distilbeam.pipelines.jobs.watch_files import Arrival, PassedOver
from distilbeam.pipelines.jobs.watch_journal import Window
from distilbeam.pipelines.labelling.dead_letters import ask_again, drop_answered
from distilbeam.pipelines.labelling.phase import Label
from distilbeam.pipelines.labelling.shard_plan import Shard, plan_shards
from distilbeam.pipelines.labelling.teacher_answers import count_dead_letters
from distilbeam.pipelines.pool.splits import Pool, plan_units
from distilbeam.pipelines.sections import WatchSection
from distilbeam.progress import Progress
from distilbeam.storage.paths import list_files
from distilbeam.student.trust import trusted
from distilbeam.teacher.softlabels import ManifestEntry, committed
from distilbeam.teacher.softlabels.manifest import manifest_files, read_entries

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WindowLabel(Label):
    """The label phase's work for a window, whose number goes into the manifest entries."""

    window: int = 0

    def place(self, shard: Shard, table: pa.Table, facts: dict[str, Any]) -> ManifestEntry:
        return super().place(shard, table, {**facts, "window": self.window})


class LostFileError(ValueError):
    """A file of a window of which something is labelled is gone, or was changed."""


class WindowWork:
    """Carries windows out.

    Args:
      job: the labelling job; its directory is held by this process.
      directory: where the windows' files are.
      options: Beam's options.
    """

    def __init__(self, job: LabellingJob, directory: Path, options: PipelineOptions) -> None:
        self.job, self.directory = job, directory
        self.phases = RecordedPhases(job.directory, job.config.engine, options)

    @property
    def settings(self) -> WatchSection:
        """The section [watch]."""
        return self.job.config.watch

    @property
    def student(self) -> str:
        """Directory of the student that scores."""
        assert self.settings.student is not None
        return str(Path(self.settings.student).resolve())

    def student_columns(self) -> tuple[str, ...]:
        """Columns that the student reads."""
        return tuple(cached_student(self.student).config.input.columns)

    def without_lost(self, window: Window) -> Window:
        """Leave files that are gone or were changed out of a window of which nothing is labelled yet."""
        lost = {file.name: what for file in window.files if (what := self._lost(file))}
        if not lost or self._begun(window):
            return window
        passed_over = tuple(
            PassedOver(file.name, file.bytes, file.mtime_ns, f"it {lost[file.name]} before its window was labelled")
            for file in window.files
            if file.name in lost
        )
        files = tuple(file for file in window.files if file.name not in lost)
        return replace(window, files=files, passed_over=(*window.passed_over, *passed_over))

    def _begun(self, window: Window) -> bool:
        entries = read_entries(manifest_files(self.job.dataset))
        letters = list_files(self.job.directory.dead_letters(f"window={window.number:06d}"), "*.parquet")
        selected = self.job.directory.root / "selected" / f"window={window.number:06d}"
        return bool(letters) or selected.exists() or any(e.extra.get("window") == window.number for e in entries)

    def _lost(self, file: Arrival) -> str:
        path = self.directory / file.name
        state = path.stat() if path.exists() else None
        if state is not None and (state.st_size, state.st_mtime_ns) == (file.bytes, file.mtime_ns):
            return ""
        return "is gone" if state is None else "was changed"

    def do(self, window: Window, progress: Progress) -> dict[str, Any]:
        """Carry a window out, or what is left of it.

        Returns:
          Numbers of rows: those that arrived, were wanted, labelled, and failed.

        Raises:
          LostFileError: a file of the window is gone or was changed.
          PhaseError: work that failed in every attempt.
        """
        if not window.files:
            return {"rows": 0, "wanted": 0, "labelled": 0, "failed": 0}
        pool = self._pool(window)
        picks = None if window.budget is None else self._choose(window, pool, progress)
        dead_letters = self.job.directory.dead_letters(f"window={window.number:06d}")
        work = self._work(window, dead_letters, picks)
        engine = self.job.config.engine
        tasks = plan_shards(pool.units, picks, engine.shard_rows, self.job.spec, engine.shard_bytes)
        spec, done = self.job.spec, committed(self.job.dataset)
        again = ask_again(dead_letters, pool.units, picks, engine.shard_rows, spec, done) if engine.retry else []
        self.phases.carry_out("label", work, [*tasks, *again], progress, labels=self.job.dataset)
        drop_answered(dead_letters, committed(self.job.dataset))
        wanted, failed = sum(task.rows for task in tasks), count_dead_letters(dead_letters)
        return {"rows": pool.rows, "wanted": wanted, "labelled": wanted - failed, "failed": failed}

    def _pool(self, window: Window) -> Pool:
        paths = [self.directory / file.name for file in window.files]
        for path, file in zip(paths, window.files, strict=True):
            if what := self._lost(file):
                raise LostFileError(
                    f"{path} {what} before window {window.number} was labelled; put it back as it was and start again"
                )
        columns = [*self.job.columns, *(self.student_columns() if self.settings.student else ())]
        pool = plan_units(paths, self.job.config.engine.unit_rows, "--watch", self.directory, columns)
        checksums = {str(path.resolve()): file.checksum for path, file in zip(paths, window.files, strict=True)}
        # the whole content is part of a unit's id, which a footer may not tell from another
        units = (
            replace(
                unit,
                uid=hashlib.blake2b(f"{unit.uid}{checksums[unit.path]}".encode(), digest_size=8).hexdigest(),
                pool_row=unit.pool_row + window.first_row,
            )
            for unit in pool.units
        )
        return replace(pool, units=tuple(units))

    def _choose(self, window: Window, pool: Pool, progress: Progress) -> str:
        settings, student = self.settings, self.student
        assert window.budget is not None
        assert settings.wrong_share is not None
        choice = Choice(
            pool=pool,
            directory=self.job.directory.root / "selected" / f"window={window.number:06d}",
            method="rad",
            budget=min(window.budget, pool.rows),
            wrong_share=settings.wrong_share,
            bought=(),
            seed=settings.seed,
            round=window.number,
            digests={"pool": pool.digest, "student": cached_student(student).fingerprint()},
        )
        batch_rows = self.job.config.engine.batch_rows
        score = Score(
            student, settings.gain, str(choice.gains), (), self.student_columns(), batch_rows, trust=trusted()
        )
        self.phases.carry_out("score", score, pool.units, progress)
        usable = pool.rows
        if unusable := gather_unusable(choice.gains, pool.units):
            log.warning(unusable_sentence(unusable, unusable_list(choice.gains)))
            usable -= len(unusable)
        if not usable:
            choice.picks.mkdir(parents=True, exist_ok=True)
            return str(choice.picks)
        choose(replace(choice, budget=min(window.budget, usable)))
        return str(choice.picks)

    def _work(self, window: Window, dead_letters: Path, picks: str | None) -> WindowLabel:
        work = self.job.work(self.job.dataset, dead_letters)
        fields = {**vars(work), "growing": False, "picks": picks}
        return WindowLabel(**fields, window=window.number)
