"""A labelling job: soft labels for every row of a pool that may grow.

The dataset is `labels/` in the job's directory. Each call labels what has no label yet: rows of new and of changed files, and
those that failed before. Answers are never asked for twice: what a row asks is looked up among all that was answered, so that
files may be renamed, merged or written again. Labels of files that are gone are kept until they are pruned. A dataset of
another teacher or form of labels is set aside in `superseded/`, and comes back from there when teacher and form do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines.config import LabelConfig, write_config
from distilbeam.pipelines.engine.display import Report
from distilbeam.pipelines.engine.model_cache import cached_teacher, teacher_text
from distilbeam.pipelines.engine.phase import PhaseReport, run_phase
from distilbeam.pipelines.jobs.directory import RunDirectory, opened_run
from distilbeam.pipelines.jobs.move_dataset import move_folder
from distilbeam.pipelines.jobs.work_log import add_work, with_counts_of
from distilbeam.pipelines.labelling import reconcile
from distilbeam.pipelines.labelling.comparing import changed_files, find_rows
from distilbeam.pipelines.labelling.contents import Contents, read_contents
from distilbeam.pipelines.labelling.copying import Copy, answers_fit, copy_answers, plan_copies
from distilbeam.pipelines.labelling.dead_letter_rows import any_letters, dead_rows, set_aside
from distilbeam.pipelines.labelling.dead_letters import drop_answered, none_answered_sentence
from distilbeam.pipelines.labelling.label_rows import Labelling
from distilbeam.pipelines.labelling.matching import match, read_rows_of
from distilbeam.pipelines.labelling.phase import Label
from distilbeam.pipelines.labelling.reconcile import Mask, Standing, Stored, wanted_pieces
from distilbeam.pipelines.labelling.saved_answers import rows_saved
from distilbeam.pipelines.labelling.shard_plan import Bounds, Part, Task, plan_pieces
from distilbeam.pipelines.labelling.shard_work import part_rows
from distilbeam.pipelines.labelling.teacher_answers import count_dead_letters
from distilbeam.pipelines.pool.datasets import require_columns
from distilbeam.pipelines.pool.first_rows import first_rows
from distilbeam.pipelines.pool.reserved_names import require_free_for_labelling
from distilbeam.pipelines.pool.row_ranges import from_ranges, to_ranges
from distilbeam.pipelines.pool.splits import Pool, Unit, plan_pool
from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import read_json, write_json
from distilbeam.storage.paths import is_remote, within
from distilbeam.teacher.softlabels import ManifestEntry, SoftLabelSpec, committed, compact_manifest, read_manifest
from distilbeam.teacher.softlabels.manifest import manifest_files
from distilbeam.teacher.softlabels.placing import placed_entries
from distilbeam.teacher.tfserving.probing import with_probe_shape

_LISTING_S = 5.0  # between two listings of a store, which cost money
_SEARCHED = 10  # times engine.compare_rows: labelled rows that are searched for answers to new ones
_GATHERED_FROM = 64  # manifest entries in a store, which are requests for every reader


@dataclass(frozen=True)
class LabelPlan:
    """What a call would do.

    Attributes:
      pool: the pool as it is now.
      standing: how the dataset stands to it.
      before: what was known of its files.
      contents: what is known of them from now on.
      tasks: the shards to label.
      copies: the shards whose answers are known.
      changes: "new", "changed" or "gone" by name of a file.
      rows_wanted: rows without a label, those that wait for the answer to an identical one included.
      rows_waiting: rows that ask what another one asks.
      rows_same: rows that are the same as another, id and question, and are kept once.
      rows_saved: rows to label whose answers are kept of a call that was stopped.
      rows_dead: rows that had no answer when they were asked; those of them that are wanted are asked again.
      compared: whether the rows were compared with each other and with what is labelled.
      superseded: rows with labels of another teacher or form, which would be set aside.
      because: in what the former labels differ: "teacher", "kind", ...
    """

    pool: Pool
    standing: Standing
    before: Contents
    contents: Contents
    tasks: tuple[Task, ...]
    copies: tuple[Copy, ...]
    changes: dict[str, str]
    rows_wanted: int
    rows_waiting: int
    rows_same: int
    rows_saved: int
    rows_dead: int
    compared: bool
    superseded: int
    because: tuple[str, ...]

    @property
    def shards(self) -> int:
        """Number of shards to label."""
        return sum(len(task.shards) for task in self.tasks)

    @property
    def rows_asked(self) -> int:
        """Rows that the teacher is asked about."""
        return sum(task.rows for task in self.tasks)

    @property
    def rows_copied(self) -> int:
        """Rows whose answer is known from another row."""
        return sum(copy.shard.rows for copy in self.copies)

    @property
    def rows_labelled(self) -> int:
        """Rows of the pool with a label or a known answer."""
        return self.standing.rows_kept + self.rows_copied


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

    def plan(
        self, *, check_content: bool = False, retry: bool = True, prune: bool = False, search_all: bool = False
    ) -> LabelPlan:
        """Compare the pool with the dataset: footers and the manifest, and the rows that may have a known answer.

        Args:
          check_content: compare the rows of all files with what was labelled, not only of those that were touched since.
          retry: ask rows in the dead letters again.
          prune: drop labels of files that are gone.
          search_all: look for answers in all shards, however many there are.

        Raises:
          ValueError: a missing file or column, two rows with one id, or a dataset that is not a labelling job's.
        """
        planned = self._pool()
        require_columns(planned.columns, self.columns, "data.pool")
        entries = self._entries(self.dataset)
        because = tuple(_differences(entries[0].spec, self.spec)) if entries else ()
        dataset = self._set_aside(self.spec) if because or not entries else self.dataset
        former = entries if dataset == self.dataset else self._entries(dataset)
        before = contents = read_contents(self._contents)
        pool = contents.versioned(planned)
        touched = contents.touched(pool, check_content)
        contents = contents.with_changed(changed_files(pool, touched, dataset, former, self._labelling))
        pool = contents.versioned(planned)
        standing = reconcile.compare(
            pool,
            dataset,
            former,
            replaced=contents.replaced(pool),
            resolve=lambda entry, part, first, unit: find_rows(
                dataset / entry.path, first, part, unit, self._labelling
            ),
        )
        if prune:
            standing = standing.pruned()
        same = contents.same if not (prune or standing.rows_dropped) else {}
        dead = dead_rows(self.dead_letters, pool)
        wanted = _wanted(pool, standing, same, {} if retry else dead)
        plan = self._plan(pool, standing, contents, wanted, same, dead, because, entries, search_all)
        return replace(plan, before=before, changes=self._changes(pool, before, contents))

    def _plan(
        self,
        pool: Pool,
        standing: Standing,
        contents: Contents,
        wanted: Mapping[str, Mask],
        same: Mapping[str, tuple[int, ...]],
        dead: Mapping[str, Mask],
        because: tuple[str, ...],
        entries: Sequence[ManifestEntry],
        search_all: bool,
    ) -> LabelPlan:
        bounds = Bounds(self.config.engine.shard_rows, self.config.engine.shard_bytes)
        parts = self._pieces(pool, wanted, bounds)
        rows = sum(part.rows for part in parts)
        others = self._others(because) if rows else ()
        leaving = bool(standing.rows_gone or standing.rows_dropped or others)
        compared = bool(rows) and (leaving or search_all or rows <= self.config.engine.compare_rows)
        copies: tuple[Copy, ...] = ()
        waiting = 0
        if compared:
            sources = (*(standing.stored if search_all else self._searched(standing, rows)), *others)
            found = match(
                read_rows_of(parts, self._input, self._labelling),
                sources,
                self._input,
                pool,
                self.config.data.id is not None,
            )
            searched = {shard.entry.key: shard for shard in found.stored}
            standing = Standing(tuple(searched.get(s.entry.key, s) for s in standing.stored), standing.labelled)
            copied = self._pieces(pool, _masks(parts, found.copied), bounds)
            copies = plan_copies(copied, found, sources, bounds, self.spec)
            same = _joined(same, _masks(parts, found.same))
            waiting = int(found.waiting.sum())
            unknown = _masks(parts, ~(found.copied | found.same | found.waiting))
            parts = self._pieces(pool, unknown, bounds)
            rows -= int((found.copied | found.same).sum())
        tasks = tuple(plan_pieces(parts, bounds, self.spec))
        asked = [part_rows(shard) for task in tasks for shard in task.shards]
        return LabelPlan(
            pool=pool,
            standing=standing,
            contents=contents.of(pool, same),
            tasks=tasks,
            copies=copies,
            before=contents,
            changes={},
            rows_wanted=rows,
            rows_waiting=waiting,
            rows_same=sum(len(from_ranges(ranges)) for ranges in same.values()),
            rows_saved=rows_saved(str(self.dataset), self.spec.to_json(), asked) if asked else 0,
            rows_dead=sum(int(mask.sum()) for mask in dead.values()),
            compared=compared or not rows,
            superseded=sum(entry.rows for entry in entries) if because else 0,
            because=because,
        )

    def changed_files(self) -> list[str]:
        """Read all labelled rows of the pool and list the files that hold something else."""
        contents = read_contents(self._contents)
        pool = contents.versioned(self._pool())
        known = contents.touched(pool, check_all=True)
        changed = changed_files(pool, known, self.dataset, self._entries(self.dataset), self._labelling)
        others = [
            name for name, footer in pool.files if name in contents.files and contents.files[name].footer != footer
        ]
        return sorted({*changed, *others})

    def label(
        self, plan: LabelPlan, options: PipelineOptions, report: Report, relabel: bool = False, **how: bool
    ) -> PhaseReport:
        """Carry out a plan.

        Args:
          plan: the plan, made while this process holds the directory.
          options: Beam's options.
          report: told the rows done and all rows to label.
          relabel: set labels of another teacher or form aside and label again.
          **how: what the plan was made with, see `plan`.

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
                    f"them aside and asks for {plan.rows_asked:,} rows, 'distilbeam plan' says what that costs"
                )
            move_folder(self.dataset, self._set_aside(read_manifest(self.dataset).spec), self.directory.root)
        plan = self.prepare(plan, **how)
        letters = any_letters(self.dead_letters)
        if letters:
            self._set_letters_aside(plan)
        done = self._phase(plan, options, report)
        if letters:
            drop_answered(self.dead_letters, committed(self.dataset))
        if plan.tasks or letters:
            self._require_some()
        if plan.rows_waiting:
            self._bring_up(self.plan(retry=False, search_all=True))
        if is_remote(self.dataset) and len(manifest_files(self.dataset)) >= _GATHERED_FROM:
            compact_manifest(self.dataset)
        add_work(self.directory.work, "label", with_counts_of(done, self.dataset, plan.tasks))
        write_json(self.directory.root / "pool.json", dict(plan.pool.files))
        with replacing(self.directory.config) as temporary:
            write_config(temporary, self.config)
        return done

    def prepare(self, plan: LabelPlan, **how: bool) -> LabelPlan:
        """Do of a plan what asks nobody: take up labels that were set aside, copy known answers, take out what does not hold."""
        if self._take_up() or plan.because:
            plan = self.plan(**how)  # the same, of what now is elsewhere
        self._bring_up(plan)
        return plan

    def _bring_up(self, plan: LabelPlan) -> None:
        """Copy known answers and take out what does not hold; a call that is killed in between is repeated."""
        if plan.contents != plan.before:
            plan.contents.write(self._contents)
        copy_answers(plan.copies, self.dataset, self.work(self.dataset, self.dead_letters))
        reconcile.mend(plan.standing.stored)

    def _set_letters_aside(self, plan: LabelPlan) -> None:
        """Set the dead letters of rows that are asked again aside, and forget those of rows that are not in the pool."""
        shards = [shard for task in plan.tasks for shard in task.shards]
        set_aside(self.dead_letters, shards, plan.pool, committed(self.dataset))

    def _require_some(self) -> None:
        failed = count_dead_letters(self.dead_letters)
        if failed and not manifest_files(self.dataset):
            raise ValueError(none_answered_sentence(self.dead_letters, failed))

    def work(self, output: Path, dead_letters: Path) -> Label:
        """Return the label phase's work, into given directories."""
        return Label(
            labelling=self._labelling,
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

    @cached_property
    def _labelling(self) -> Labelling:
        return Labelling(
            self.teacher,
            self.spec,
            id_column=self.config.data.id,
            teacher_batch=self.config.engine.teacher_batch,
            question=() if set(self._input) <= set(self.config.data.carry) else self._input,
        )

    @property
    def _input(self) -> tuple[str, ...]:
        """The columns that the teacher reads."""
        return tuple(self.config.teacher.input.columns)

    @property
    def _contents(self) -> Path:
        return self.directory.root / "contents.json"

    def _pieces(self, pool: Pool, wanted: Mapping[str, Mask], bounds: Bounds) -> list[Part]:
        pieces = (
            wanted_pieces(unit, wanted[unit.uid], bounds.rows_of(unit, self.spec))
            for unit in pool.units
            if unit.uid in wanted
        )
        return [piece for found in pieces for piece in found]

    def _searched(self, standing: Standing, rows: int) -> tuple[Stored, ...]:
        """Choose the shards in which answers are looked for: all, or those that lose rows where all would take too long."""
        all_rows = sum(shard.entry.rows for shard in standing.stored)
        if rows + all_rows <= _SEARCHED * self.config.engine.compare_rows:
            return standing.stored
        return tuple(shard for shard in standing.stored if not shard.held.all())

    def _others(self, because: tuple[str, ...]) -> tuple[Stored, ...]:
        """List the shards that are set aside, or would be, and have answers of this teacher."""
        folder = self.directory.root / "superseded"
        places = [path for path in folder.iterdir() if path.is_dir()] if folder.exists() else []
        own = self._set_aside(self.spec)
        datasets = [path for path in places if path != own] + ([self.dataset] if because else [])
        return tuple(
            shard
            for dataset in datasets
            for entry in self._entries(dataset)
            if (shard := Stored(dataset, entry, (), *(np.zeros((2, entry.rows), bool))))
            and answers_fit(shard, self.spec)
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
        where = within(self.base, self.config.data.pool)
        return plan_pool(where, self.config.engine.unit_rows, "data.pool", self.columns)

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

    def _changes(self, pool: Pool, before: Contents, contents: Contents) -> dict[str, str]:
        path = self.directory.root / "pool.json"
        then = read_json(path) if path.exists() else {}
        now = dict(pool.files)
        found = {name: "changed" if name in then else "new" for name in now if then.get(name) != now[name]}
        again = {name: "changed" for name, file in before.files.items() if file.version != contents.files[name].version}
        return found | again | {name: "gone" for name in then if name not in now}

    def _set_aside(self, spec: SoftLabelSpec) -> Path:
        digest = hashlib.blake2b(f"{spec.meaning()} {spec.teacher}".encode(), digest_size=8).hexdigest()
        return self.directory.root / "superseded" / digest

    def _take_up(self) -> bool:
        """Take up the dataset of this teacher and form that was set aside, where there is none in use; tell whether it did."""
        former = self._set_aside(self.spec)
        if self.dataset.exists() or not former.exists():
            return False
        move_folder(former, self.dataset, self.directory.root)
        return True


def _wanted(
    pool: Pool, standing: Standing, same: Mapping[str, tuple[int, ...]], dead: Mapping[str, Mask]
) -> dict[str, Mask]:
    """Tell which rows of each unit have no label, and are neither kept once with another nor given up."""

    def of(unit: Unit) -> Mask:
        wanted = ~standing.labelled[unit.uid] if unit.uid in standing.labelled else np.ones(unit.rows, bool)
        wanted[from_ranges(same.get(unit.uid, ()))] = False
        return wanted & ~dead[unit.uid] if unit.uid in dead else wanted

    masks = {unit.uid: of(unit) for unit in pool.units}
    return {uid: mask for uid, mask in masks.items() if mask.any()}


def _masks(parts: Sequence[Part], chosen: Mask) -> dict[str, Mask]:
    """Spread what was chosen of the rows of parts over their units."""
    masks: dict[str, Mask] = {}
    first = 0
    for part in parts:
        here = chosen[first : first + part.rows]
        first += part.rows
        if here.any():
            mask = masks.setdefault(part.unit.uid, np.zeros(part.unit.rows, bool))
            mask[part.numbers()[here]] = True
    return masks


def _joined(same: Mapping[str, tuple[int, ...]], more: Mapping[str, Mask]) -> dict[str, tuple[int, ...]]:
    rows = {uid: np.flatnonzero(mask) for uid, mask in more.items()}
    both = {uid: np.union1d(from_ranges(same.get(uid, ())), rows.get(uid, ())) for uid in {*same, *rows}}
    return {uid: to_ranges(found.astype(np.int64)) for uid, found in both.items()}


def _differences(one: SoftLabelSpec, two: SoftLabelSpec) -> list[str]:
    carried = [f"carried ({', '.join(one.carried)} and {', '.join(two.carried)})"] if one.carried != two.carried else []
    return one.differences(two) + carried


@contextmanager
def opened_job(config: LabelConfig, base: Path) -> Iterator[LabellingJob]:
    """Create or reopen a labelling job and hold its directory until the block ends; see `directory.opened_run`."""
    with opened_run(config, base) as directory:
        yield LabellingJob(config, base, directory)


def write_metrics(job: LabellingJob, plan: LabelPlan, done: PhaseReport) -> dict[str, Any]:
    """Write `metrics.json`: what this call did, what the dataset holds, what all calls have cost; return it."""
    manifest = read_manifest(job.dataset)
    metrics = {
        "labelled": plan.rows_asked,
        "copied": plan.rows_copied,
        "kept": plan.standing.rows_kept,
        "gone": plan.standing.rows_gone,
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
