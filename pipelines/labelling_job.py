"""A labelling job: soft labels for every row of a pool that may grow.

The dataset is `labels/` in the job's directory. Each call labels what has no label yet: rows of new and of changed files.
Labels of rows that are gone are dropped, answers are never asked for twice. A dataset of another teacher or form of labels
is set aside in `superseded/`, and comes back from there when teacher and form do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines import growth
from distilbeam.pipelines.answers import count_dead_letters
from distilbeam.pipelines.config import LabelConfig, write_config
from distilbeam.pipelines.dead_letters import ask_again, drop_answered, is_of_again, leave, none_answered_sentence
from distilbeam.pipelines.display import Report
from distilbeam.pipelines.files import read_json, write_json
from distilbeam.pipelines.first_rows import first_rows
from distilbeam.pipelines.growth import Standing
from distilbeam.pipelines.inputs import require_columns
from distilbeam.pipelines.label import Label
from distilbeam.pipelines.labelling import Labelling
from distilbeam.pipelines.models import cached_teacher, teacher_text
from distilbeam.pipelines.moving import move_folder
from distilbeam.pipelines.phases import PhaseReport, run_phase
from distilbeam.pipelines.reserved_names import require_free_for_labelling
from distilbeam.pipelines.rundir import RunDirectory, opened_run
from distilbeam.pipelines.shards import Task, plan_pieces
from distilbeam.pipelines.units import Pool, plan_pool
from distilbeam.pipelines.work_log import add_work, with_counts_of
from distilbeam.teacher.probing import with_probe_shape
from distilbeam.teacher.softlabels import ManifestEntry, SoftLabelSpec, committed, compact_manifest, read_manifest
from distilbeam.teacher.softlabels.atomic import replacing
from distilbeam.teacher.softlabels.manifest import manifest_files
from distilbeam.teacher.softlabels.places import is_remote, list_files, remove_files, within
from distilbeam.teacher.softlabels.placing import placed_entries

_LISTING_S = 5.0  # between two listings of a store, which cost money
_GATHERED_FROM = 64  # manifest entries in a store, which are requests for every reader


@dataclass(frozen=True)
class LabelPlan:
    """What a call would do.

    Attributes:
      pool: the pool as it is now.
      standing: how the dataset stands to it.
      tasks: the shards to label.
      changes: "new", "changed" or "gone" by name of a file.
      superseded: rows with labels of another teacher or form, which would be set aside.
      because: in what the former labels differ: "teacher", "kind", ...
    """

    pool: Pool
    standing: Standing
    tasks: tuple[Task, ...]
    changes: dict[str, str]
    superseded: int
    because: tuple[str, ...]

    @property
    def shards(self) -> int:
        """Number of shards to label."""
        return sum(len(task.shards) for task in self.tasks)


class LabellingJob:
    """A labelling job of one configuration in one directory.

    Args:
      config: the configuration.
      base: directory that relative paths are relative to.
      directory: the job's directory, held by this process where anything is to be done.

    Raises:
      ValueError: a column that is read or carried has a name of ours.
    """

    def __init__(self, config: LabelConfig, base: Path, directory: RunDirectory) -> None:
        data, read = config.data, config.teacher.input.columns
        require_free_for_labelling(data.carry, read, data.id, "data.carry")
        self.config, self.base, self.directory = config, base, directory

    @property
    def dataset(self) -> Path:
        """The soft-label dataset."""
        return self.directory.root / "labels"

    @property
    def dead_letters(self) -> Path:
        """Directory of the rows that could not be labelled."""
        return self.directory.dead_letters("labels")

    @cached_property
    def teacher(self) -> str:
        """The teacher as text that travels to workers."""
        columns = self.config.teacher.input.columns
        told = with_probe_shape(self.config.teacher, self.base, first_rows(self._pool, columns))
        return teacher_text(told, self.base, self.config.data.classes)

    @cached_property
    def spec(self) -> SoftLabelSpec:
        """How the answers are stored."""
        data, labels = self.config.data, self.config.labels
        return SoftLabelSpec(
            num_classes=data.num_classes or len(data.classes),
            kind=labels.kind,
            k=labels.k,
            temperature=labels.temperature,
            storage=labels.storage,
            classes=data.classes or None,
            teacher=cached_teacher(self.teacher).fingerprint(),
            carried=data.carry,
        )

    def plan(self) -> LabelPlan:
        """Compare the pool with the dataset, from footers and the manifest alone.

        Raises:
          ValueError: a missing file or column, or a dataset that is not a labelling job's.
        """
        config = self.config
        pool = self._pool()
        require_columns(pool.columns, self.columns, "data.pool")
        entries = self._entries(self.dataset)
        because = tuple(_differences(entries[0].spec, self.spec)) if entries else ()
        former = entries if entries and not because else self._entries(self._set_aside(self.spec))
        standing = growth.compare(pool, former, config.engine.shard_rows)
        tasks = plan_pieces(standing.wanted, config.engine.shard_rows, self.spec)
        superseded = sum(entry.rows for entry in entries) if because else 0
        return LabelPlan(pool, standing, tuple(tasks), self._changes(pool), superseded, because)

    def label(self, plan: LabelPlan, options: PipelineOptions, report: Report, relabel: bool = False) -> PhaseReport:
        """Carry out a plan.

        Args:
          plan: the plan, made while this process holds the directory.
          options: Beam's options.
          report: told the rows done and all rows to label.
          relabel: set labels of another teacher or form aside and label again.

        Returns:
          What it cost.

        Raises:
          ValueError: there are labels of another teacher or form, and `relabel` is false.
          PhaseError: work that failed in every attempt.
        """
        if plan.because:
            if not relabel:
                raise ValueError(
                    f"the {plan.superseded:,} labels in {self.dataset} differ in {', '.join(plan.because)}; --relabel sets "
                    f"them aside and asks for {plan.standing.rows_wanted:,} rows, 'distilbeam plan' says what that costs"
                )
            move_folder(self.dataset, self._set_aside(read_manifest(self.dataset).spec), self.directory.root)
        self._take_up()
        growth.apply(self.dataset, self.dead_letters, plan.standing, plan.pool)
        self._forget_dead_letters(plan)
        again = self._again(plan)
        plan = replace(plan, tasks=(*plan.tasks, *again))
        done = self._phase(plan, options, report)
        drop_answered(self.dead_letters, committed(self.dataset))
        self._require_some()
        if is_remote(self.dataset) and len(manifest_files(self.dataset)) >= _GATHERED_FROM:
            compact_manifest(self.dataset)
        add_work(self.directory.work, "label", with_counts_of(done, self.dataset, plan.tasks))
        write_json(self.directory.root / "pool.json", dict(plan.pool.files))
        with replacing(self.directory.config) as temporary:
            write_config(temporary, self.config)
        return done

    def _again(self, plan: LabelPlan) -> list[Task]:
        """Plan to ask again about the rows that failed, unless they are to be left."""
        done, engine = committed(self.dataset), self.config.engine
        if engine.retry:
            return ask_again(self.dead_letters, plan.pool.units, None, engine.shard_rows, self.spec, done)
        leave(self.dead_letters, done)
        return []

    def _require_some(self) -> None:
        failed = count_dead_letters(self.dead_letters)
        if failed and not manifest_files(self.dataset):
            raise ValueError(none_answered_sentence(self.dead_letters, failed))

    def work(self, output: Path, dead_letters: Path) -> Label:
        """Return the label phase's work, into given directories."""
        labelling = Labelling(
            self.teacher,
            self.spec,
            id_column=self.config.data.id,
            teacher_batch=self.config.engine.teacher_batch,
        )
        return Label(
            labelling=labelling,
            output=str(output),
            dead_letters=str(dead_letters),
            columns=self.columns,
            picks=None,
            batch_rows=self.config.engine.batch_rows,
            growing=True,
            max_failures=self.config.engine.max_failures,
            flush_s=self.config.engine.flush_s,
            retry=self.config.engine.retry,
        )

    def _phase(self, plan: LabelPlan, options: PipelineOptions, report: Report) -> PhaseReport:
        return run_phase(
            "label",
            self.work(self.dataset, self.dead_letters),
            plan.tasks,
            errors=self.directory.errors("label"),
            options=options,
            progress=report,
            attempts=self.config.engine.attempts,
            poll_s=_LISTING_S if is_remote(self.dataset) else 0.2,
        )

    def _pool(self) -> Pool:
        return plan_pool(within(self.base, self.config.data.pool), self.config.engine.unit_rows, "data.pool")

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the pool that are read."""
        data = self.config.data
        columns = [*data.carry, *self.config.teacher.input.columns, *([data.id] if data.id else [])]
        return tuple(dict.fromkeys(columns))

    def _entries(self, dataset: Path) -> tuple[ManifestEntry, ...]:
        """List the shards that are committed, and those that will be when the directory is held: a killed process placed them."""
        there = read_manifest(dataset).entries if manifest_files(dataset) else ()
        keys = {entry.key for entry in there}
        return there + tuple(entry for entry in placed_entries(dataset) if entry.key not in keys)

    def _changes(self, pool: Pool) -> dict[str, str]:
        path = self.directory.root / "pool.json"
        then = read_json(path) if path.exists() else {}
        now = dict(pool.files)
        found = {name: "changed" if name in then else "new" for name in now if then.get(name) != now[name]}
        return found | {name: "gone" for name in then if name not in now}

    def _set_aside(self, spec: SoftLabelSpec) -> Path:
        digest = hashlib.blake2b(f"{spec.meaning()} {spec.teacher}".encode(), digest_size=8).hexdigest()
        return self.directory.root / "superseded" / digest

    def _take_up(self) -> None:
        """Take up the dataset of this teacher and form that was set aside, where there is none in use."""
        former = self._set_aside(self.spec)
        if not self.dataset.exists() and former.exists():
            move_folder(former, self.dataset, self.directory.root)

    def _forget_dead_letters(self, plan: LabelPlan) -> None:
        """Remove the dead letters of shards that are not in the dataset and not among those to label."""
        if letters := list_files(self.dead_letters, "*.parquet"):
            keys = {shard.key for task in plan.tasks for shard in task.shards} | committed(self.dataset)
            remove_files([path for path in letters if path.stem not in keys and not is_of_again(path.stem)])


def _differences(one: SoftLabelSpec, two: SoftLabelSpec) -> list[str]:
    carried = [f"carried ({', '.join(one.carried)} and {', '.join(two.carried)})"] if one.carried != two.carried else []
    return one.differences(two) + carried


@contextmanager
def opened_job(config: LabelConfig, base: Path) -> Iterator[LabellingJob]:
    """Create or reopen a labelling job and hold its directory until the block ends; see `rundir.opened_run`."""
    with opened_run(config, base) as directory:
        yield LabellingJob(config, base, directory)


def write_metrics(job: LabellingJob, plan: LabelPlan, done: PhaseReport) -> dict[str, Any]:
    """Write `metrics.json`: what this call did, what the dataset holds, what all calls have cost; return it."""
    manifest = read_manifest(job.dataset)
    metrics = {
        "labelled": sum(task.rows for task in plan.tasks),
        "kept": plan.standing.rows_kept,
        "dropped": plan.standing.rows_dropped,
        "failed": count_dead_letters(job.dead_letters),
        "rows": manifest.rows,
        "shards": len(manifest.entries),
        "bytes": manifest.bytes,
        "seconds": done.seconds,
        "work": read_json(job.directory.work) if job.directory.work.exists() else {},
    }
    write_json(job.directory.root / "metrics.json", metrics)
    return metrics
