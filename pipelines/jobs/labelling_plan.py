"""The plan of a labelling job's call: the pool compared with its soft labels, answers looked up, shards planned.

Nothing is written. What a row asks is looked up among all that was answered, so that files may be renamed, merged or written
again without an answer being asked for twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from distilbeam.pipelines.jobs.pool_labels import PoolLabels
from distilbeam.pipelines.labelling import reconcile
from distilbeam.pipelines.labelling.comparing import changed_files, find_rows
from distilbeam.pipelines.labelling.contents import Contents, read_contents
from distilbeam.pipelines.labelling.copying import Copy, answers_fit, plan_copies
from distilbeam.pipelines.labelling.dead_letter_rows import dead_rows
from distilbeam.pipelines.labelling.matching import match, read_rows_of
from distilbeam.pipelines.labelling.reconcile import Mask, Standing, Stored, wanted_pieces
from distilbeam.pipelines.labelling.saved_answers import rows_saved
from distilbeam.pipelines.labelling.shard_plan import Part, Task, plan_pieces
from distilbeam.pipelines.labelling.shard_work import part_rows
from distilbeam.pipelines.pool.datasets import require_columns
from distilbeam.pipelines.pool.row_ranges import from_ranges, to_ranges
from distilbeam.pipelines.pool.splits import Pool, Unit
from distilbeam.storage.files import read_json
from distilbeam.teacher.softlabels import ManifestEntry, SoftLabelSpec

_SEARCHED = 10  # times engine.compare_rows: labelled rows that are searched for answers to new ones


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


def plan_labels(
    labels: PoolLabels,
    *,
    check_content: bool = False,
    retry: bool = True,
    prune: bool = False,
    search_all: bool = False,
) -> LabelPlan:
    """Compare the pool with the dataset: footers and the manifest, and the rows that may have a known answer.

    Args:
      labels: the job's labels.
      check_content: compare the rows of all files with what was labelled, not only of those that were touched since.
      retry: ask rows in the dead letters again.
      prune: drop labels of files that are gone.
      search_all: look for answers in all shards, however many there are.

    Raises:
      ValueError: a missing file or column, two rows with one id, or a dataset that is not a labelling job's.
    """
    entries, because, before, contents, pool, standing = _compare(labels, check_content)
    if prune:
        standing = standing.pruned()
    same = contents.same if not (prune or standing.rows_dropped) else {}
    dead = dead_rows(labels.dead_letters, pool)
    parts = _pieces(labels, pool, _wanted(pool, standing, same, {} if retry else dead))
    known = _Known(parts, standing, same, sum(part.rows for part in parts))
    found = _look_up(labels, pool, known, because, search_all) if parts else known
    tasks = tuple(plan_pieces(found.parts, labels.bounds, labels.spec))
    asked = [part_rows(shard) for task in tasks for shard in task.shards]
    return LabelPlan(
        pool=pool,
        standing=found.standing,
        before=before,
        contents=contents.of(pool, found.same),
        tasks=tasks,
        copies=found.copies,
        changes=_changes(labels, pool, before, contents),
        rows_wanted=found.wanted,
        rows_waiting=found.waiting,
        rows_same=sum(len(from_ranges(ranges)) for ranges in found.same.values()),
        rows_saved=rows_saved(str(labels.dataset), labels.spec.to_json(), asked) if asked else 0,
        rows_dead=sum(int(mask.sum()) for mask in dead.values()),
        compared=found.compared,
        superseded=sum(entry.rows for entry in entries) if because else 0,
        because=because,
    )


class _Compared(NamedTuple):
    """The dataset in use, in what its labels differ from those asked for, and how what there is stands to the pool.

    The contents are those that were known of the pool's files before, and those that are now.
    """

    entries: tuple[ManifestEntry, ...]
    because: tuple[str, ...]
    before: Contents
    contents: Contents
    pool: Pool
    standing: Standing


def _compare(labels: PoolLabels, check_content: bool) -> _Compared:
    """Compare the pool with its labels by footers and manifests, and by rows where a file was touched."""
    planned = labels.pool()
    require_columns(planned.columns, labels.columns, "data.pool")
    entries = labels.entries(labels.dataset)
    because = tuple(_differences(entries[0].spec, labels.spec)) if entries else ()
    dataset = labels.set_aside(labels.spec) if because or not entries else labels.dataset
    former = entries if dataset == labels.dataset else labels.entries(dataset)
    before = contents = read_contents(labels.contents_file)
    pool = contents.versioned(planned)
    touched = contents.touched(pool, check_content)
    contents = contents.with_changed(changed_files(pool, touched, dataset, former, labels.labelling))
    pool = contents.versioned(planned)
    standing = reconcile.compare(
        pool,
        dataset,
        former,
        replaced=contents.replaced(pool),
        resolve=lambda entry, part, first, unit: find_rows(dataset / entry.path, first, part, unit, labels.labelling),
    )
    return _Compared(entries, because, before, contents, pool, standing)


@dataclass(frozen=True)
class _Known:
    """What is known of the rows without a label.

    Attributes:
      parts: the rows whose answer is not known.
      standing: how the dataset stands to the pool.
      same: rows of units that are kept once with another, as ranges.
      copies: shards of the rows whose answer is known.
      wanted: rows without a label: these, and those of which one of them asks the same.
      waiting: the latter.
      compared: whether the rows were compared with each other and with what is labelled.
    """

    parts: list[Part]
    standing: Standing
    same: Mapping[str, tuple[int, ...]]
    wanted: int
    copies: tuple[Copy, ...] = ()
    waiting: int = 0
    compared: bool = True


def _look_up(labels: PoolLabels, pool: Pool, known: _Known, because: tuple[str, ...], search_all: bool) -> _Known:
    """Look for known answers to the rows without a label, and for rows among them that ask the same."""
    parts, standing, rows = known.parts, known.standing, known.wanted
    others = _others(labels, because)
    leaving = bool(standing.rows_gone or standing.rows_dropped or others)
    # More rows than engine.compare_rows are each asked: comparing would read them all once more. But where rows have left a file,
    # or labels were set aside, answers are there for the taking, and nothing else finds them.
    if not (leaving or search_all or rows <= labels.config.engine.compare_rows):
        return replace(known, compared=False)
    sources = (*(standing.stored if search_all else _searched(labels, standing, rows)), *others)
    found = match(
        read_rows_of(parts, labels.input_columns, labels.labelling),
        sources,
        labels.input_columns,
        pool,
        labels.config.data.id is not None,
    )
    searched = {shard.entry.key: shard for shard in found.stored}
    copied = _pieces(labels, pool, _masks(parts, found.copied))
    unknown = ~(found.copied | found.same | found.waiting)
    return _Known(
        parts=_pieces(labels, pool, _masks(parts, unknown)),
        standing=Standing(tuple(searched.get(s.entry.key, s) for s in standing.stored), standing.labelled),
        same=_joined(known.same, _masks(parts, found.same)),
        copies=plan_copies(copied, found, sources, labels.bounds, labels.spec),
        wanted=int((~(found.copied | found.same)).sum()),
        waiting=int(found.waiting.sum()),
    )


def _pieces(labels: PoolLabels, pool: Pool, wanted: Mapping[str, Mask]) -> list[Part]:
    pieces = (
        wanted_pieces(unit, wanted[unit.uid], labels.bounds.rows_of(unit, labels.spec))
        for unit in pool.units
        if unit.uid in wanted
    )
    return [piece for found in pieces for piece in found]


def _searched(labels: PoolLabels, standing: Standing, rows: int) -> tuple[Stored, ...]:
    """Choose the shards in which answers are looked for: all, or those that lose rows where all would take too long."""
    all_rows = sum(shard.entry.rows for shard in standing.stored)
    if rows + all_rows <= _SEARCHED * labels.config.engine.compare_rows:
        return standing.stored
    return tuple(shard for shard in standing.stored if not shard.held.all())


def _others(labels: PoolLabels, because: tuple[str, ...]) -> tuple[Stored, ...]:
    """List the shards that are set aside, or would be, and have answers of this teacher."""
    folder = labels.superseded
    places = [path for path in folder.iterdir() if path.is_dir()] if folder.exists() else []
    own = labels.set_aside(labels.spec)
    datasets = [path for path in places if path != own] + ([labels.dataset] if because else [])
    return tuple(
        shard
        for dataset in datasets
        for entry in labels.entries(dataset)
        if (shard := Stored(dataset, entry, (), *(np.zeros((2, entry.rows), bool)))) and answers_fit(shard, labels.spec)
    )


def _changes(labels: PoolLabels, pool: Pool, before: Contents, contents: Contents) -> dict[str, str]:
    path = labels.directory.root / "pool.json"
    then = read_json(path) if path.exists() else {}
    now = dict(pool.files)
    found = {name: "changed" if name in then else "new" for name in now if then.get(name) != now[name]}
    again = {name: "changed" for name, file in before.files.items() if file.version != contents.files[name].version}
    return found | again | {name: "gone" for name in then if name not in now}


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
