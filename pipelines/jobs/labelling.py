"""A labelling job: soft labels for every row of a pool that may grow.

The dataset is `labels/` in the job's directory. Each call labels what has no label yet: rows of new and of changed files, and
those that failed before; `labelling_plan` says which. Labels of files that are gone are kept until they are pruned. A dataset of
another teacher or form of labels is set aside in `superseded/`, and comes back from there when teacher and form do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines.config import LabelConfig, write_config
from distilbeam.pipelines.engine.phase import PhaseReport
from distilbeam.pipelines.jobs.labelling_plan import LabelPlan, plan_labels
from distilbeam.pipelines.jobs.opening import opened_run
from distilbeam.pipelines.jobs.pool_labels import PoolLabels
from distilbeam.pipelines.jobs.recorded_phases import RecordedPhases
from distilbeam.pipelines.labelling import reconcile
from distilbeam.pipelines.labelling.copying import copy_answers
from distilbeam.pipelines.labelling.dead_letter_rows import any_letters, set_aside
from distilbeam.pipelines.labelling.dead_letters import drop_answered, none_answered_sentence
from distilbeam.pipelines.labelling.teacher_answers import count_dead_letters
from distilbeam.progress import Progress
from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import read_json, write_json
from distilbeam.storage.stores import store_of
from distilbeam.teacher.softlabels import committed, compact_manifest, read_manifest
from distilbeam.teacher.softlabels.manifest import manifest_files

_GATHERED_FROM = 64  # manifest entries, where each is a request for every reader


class LabellingJob(PoolLabels):
    """Brings the soft labels of a pool up to what the pool is now; see `PoolLabels` for the arguments."""

    def plan(
        self, *, check_content: bool = False, retry: bool = True, prune: bool = False, search_all: bool = False
    ) -> LabelPlan:
        """Compare the pool with the dataset; see `plan_labels`."""
        return plan_labels(self, check_content=check_content, retry=retry, prune=prune, search_all=search_all)

    def label(
        self, plan: LabelPlan, options: PipelineOptions, progress: Progress, relabel: bool = False, **how: bool
    ) -> PhaseReport:
        """Carry out a plan.

        Args:
          plan: the plan, made while this process holds the directory.
          options: Beam's options.
          progress: told the rows done and all rows to label.
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
            aside = self.set_aside(read_manifest(self.dataset).spec)
            store_of(aside).move_folder(self.dataset, aside, self.directory.root)
        plan = self.prepare(plan, **how)
        letters = any_letters(self.dead_letters)
        if letters:
            self._set_letters_aside(plan)
        work, phases = (
            self.work(self.dataset, self.dead_letters),
            RecordedPhases(self.directory, self.config.engine, options),
        )
        done = phases.carry_out("label", work, plan.tasks, progress, labels=self.dataset)
        if letters:
            drop_answered(self.dead_letters, committed(self.dataset))
        if plan.tasks or letters:
            self._require_some()
        if plan.rows_waiting:
            self._bring_up(self.plan(retry=False, search_all=True))
        if store_of(self.dataset).by_request and len(manifest_files(self.dataset)) >= _GATHERED_FROM:
            compact_manifest(self.dataset)
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
            plan.contents.write(self.contents_file)
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

    def _take_up(self) -> bool:
        """Take up the dataset of this teacher and form that was set aside, where there is none in use; tell whether it did."""
        former = self.set_aside(self.spec)
        if self.dataset.exists() or not former.exists():
            return False
        store_of(former).move_folder(former, self.dataset, self.directory.root)
        return True


@contextmanager
def opened_job(config: LabelConfig) -> Iterator[LabellingJob]:
    """Create or reopen a labelling job and hold its directory until the block ends; see `opening.opened_run`."""
    with opened_run(config) as directory:
        yield LabellingJob(config, directory)


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
