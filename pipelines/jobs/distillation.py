"""The steps of a distillation run: train, ask, select, label, compare.

Every step reads committed files and commits files, so that a killed step is repeated and a finished one skipped. Nothing
else is state. What the steps stand on is `Run`; their order is in `pipelines.steps`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines.acquisition.find_unusable import FindUnusable
from distilbeam.pipelines.acquisition.score import Score
from distilbeam.pipelines.acquisition.select import Choice, choose
from distilbeam.pipelines.acquisition.unusable_rows import (
    gather_unusable,
    unusable_directory,
    unusable_list,
    unusable_sentence,
)
from distilbeam.pipelines.engine.model_cache import cached_student
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.kept_student import kept_round, worse_sentence
from distilbeam.pipelines.jobs.label_step import LabelStep
from distilbeam.pipelines.jobs.recorded_phases import RecordedPhases
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.jobs.teacher_check import require_order
from distilbeam.pipelines.jobs.weak_teacher import weigh_teacher
from distilbeam.pipelines.labelling.label_quality import Estimates
from distilbeam.pipelines.labelling.label_rows import Labelling
from distilbeam.pipelines.labelling.phase import Label
from distilbeam.pipelines.labelling.pooled_labels import is_pooled, pool_labels
from distilbeam.pipelines.labelling.teacher_answers import count_dead_letters
from distilbeam.pipelines.pool.splits import Pool
from distilbeam.progress import Progress
from distilbeam.selection.trust.pooling import BeliefPool
from distilbeam.storage.atomic import replacing
from distilbeam.student.trust import trusted
from distilbeam.teacher.softlabels import read_manifest

log = logging.getLogger(__name__)


class Job:
    """Carries out the steps of a run.

    Args:
      run: the run; its directory is held by this process.
      options: Beam's options for the phases.
    """

    def __init__(self, run: Run, options: PipelineOptions) -> None:
        self.run, self.config, self.directory, self.options = run, run.config, run.directory, options
        self.phases = RecordedPhases(run.directory, run.config.engine, options)

    def reopen_failed(self) -> None:
        """Let the teacher be asked again about rows that had no answer, as long as nothing was made of their labels."""
        where = self.directory
        used = {
            ("ask-validation", where.asked("validation")): [where.calibration, where.picks(0)],
            ("ask-test", where.asked("test")): [where.metrics],
            ("ask-labelled", where.asked("labelled")): [where.student(1)],
            **{(f"round={r:03d}", where.labels(r)): [where.student(r + 1)] for r in range(self.config.run.rounds)},
        }
        for (name, dataset), made in used.items():
            failed = where.summary(dataset).exists() and count_dead_letters(where.dead_letters(name))
            if failed and not any(path.exists() for path in made):
                where.summary(dataset).unlink()

    def encode(self, progress: Progress) -> None:
        """Ask the sentence encoder about rows of the pool, and regress the embeddings that students start from."""
        start = self.run.encoder_start(self.config.student)
        self.phases.carry_out("encode", start.work, self.run.inputs.pool.units, progress)
        start.fit()

    def train(self, number: int, progress: Progress) -> None:
        """Train the student on the labelled set and the soft labels of the first `number` rounds."""
        where = self.directory
        datasets = [self._to_learn(where, r, where.chooser(r)) for r in range(number)]
        self.run.train(where.student(number), datasets, progress)
        for found in kept_round(self.run, number)[1]:
            if found["round"] == number:
                log.warning(worse_sentence(found))

    def ask(self, name: str, progress: Progress) -> None:
        """Ask the teacher about the labelled, the validation or the test set.

        Raises:
          ValueError: after the validation set: the teacher is at chance, or its outputs are in another order.
        """
        if name != "validation":
            self.check_teacher()
        labelling = Labelling(
            self.run.teacher, self.run.asked_spec(name), teacher_batch=self.config.engine.teacher_batch
        )
        self._label(
            self.directory.asked(name), f"ask-{name}", self.run.labelled_set(name).plan, labelling, None, progress
        )
        if name == "validation":
            self.check_teacher()

    def check_teacher(self) -> None:
        """Stop where buying the teacher's labels is a mistake by what it answered for the validation set.

        Raises:
          ValueError: it is at chance, its outputs are in another order than the classes, or it is no better than student 0.
        """
        if self.config.data.check_classes:
            run, rng = self.run, np.random.default_rng(self.config.run.seed)
            require_order(run.answers("validation"), run.truth("validation"), run.inputs.classes, rng)
        weigh_teacher(self.run)

    def select(self, number: int, progress: Progress) -> None:
        """Score what is left of the pool with the current student, solve the game, choose."""
        self.check_teacher()
        choice = self._choice_of_round(number)
        student, units = self.directory.student(number), self.run.inputs.pool.units
        if choice.scored is None:
            self.phases.carry_out("check", self._find_unusable(student, choice.gains), units, progress)
            choice = replace(choice, bought=(*choice.bought, str(unusable_directory(choice.gains))))
        else:
            score = self._score_work(student, choice.gains, choice.bought)
            candidates = choice.candidates(self.run.inputs.pool.rows - choice.budget * number)
            score = replace(score, gain=choice.scored, candidates=candidates)
            self.phases.carry_out("score", score, units, progress)
        if unusable := gather_unusable(choice.gains, units):
            log.warning(unusable_sentence(unusable, unusable_list(choice.gains)))
        choose(choice)

    def label(self, number: int, progress: Progress) -> None:
        """Ask the teacher about the rows that a round chose."""
        self.check_teacher()
        picks, student = self.directory.picks(number), self.directory.student(number)
        reuse = tuple(map(str, self.directory.bought_elsewhere(number)))
        self._label_picks(self.directory.labels(number), f"round={number:03d}", picks, student, reuse, progress)

    def compare(self, progress: Progress) -> None:
        """Train the same student on as many uniformly chosen labels; answers that were bought already are not asked again."""
        self.check_teacher()
        where, rounds, student = self.run.comparison, self.config.run.rounds, self.directory.chooser(0)
        if not where.summary(where.labels(0)).exists():
            unusable = tuple(str(unusable_directory(self.directory.gains(r))) for r in range(rounds))
            choice = self._choice(
                where.selected(0), "uniform", self.config.selection.budget * rounds, unusable, rounds, {}
            )
            choose(choice)
            bought = [*(self.directory.labels(r) for r in range(rounds)), *self.directory.bought_elsewhere(rounds)]
            self._label_picks(
                where.labels(0), where.root.name, choice.picks, student, tuple(map(str, bought)), progress
            )
        self.run.train(where.student(1), [self._to_learn(where, 0, student)], progress)

    def sample_work(self, output: Path, dead_letters: Path) -> Label:
        """Return the label phase's work for any rows of the pool, uncalibrated and without estimates, into given directories."""
        labelling = Labelling(
            self.run.teacher,
            self.run.sample_spec,
            id_column=self.config.data.id,
            teacher_batch=self.config.engine.teacher_batch,
        )
        return self._label_work(labelling, output, dead_letters, None)

    def sample_score(self, student: Path, gains: Path) -> Score:
        """Return the score phase's work with a student, into a given directory."""
        return self._score_work(student, gains, ())

    def _to_learn(self, where: RunDirectory, number: int, student: Path) -> Path:
        """Give the labels of a round that a student is to learn: the stored ones, or those pooled with its chooser's."""
        if not self.run.pooled:
            return where.labels(number)
        if not is_pooled(where.pooled(number)):
            beliefs = BeliefPool.fit(*self.run.beside_teacher(student))
            pool_labels(where.labels(number), where.pooled(number), student, beliefs)
        return where.pooled(number)

    def _label_picks(
        self, output: Path, name: str, picks: Path, student: Path, reuse: tuple[str, ...], progress: Progress
    ) -> None:
        labelling = Labelling(
            teacher=self.run.teacher,
            spec=self.run.label_spec,
            id_column=self.config.data.id,
            teacher_batch=self.config.engine.teacher_batch,
            estimates=self._estimates(output, student),
            student=str(student),
            trust=trusted(),
            reuse=(*reuse, *([str(self.run.sampled)] if self.run.sampled.exists() else [])),
        )
        self._label(output, name, self.run.inputs.pool, labelling, str(picks), progress)

    def _label(
        self, output: Path, name: str, plan: Pool, labelling: Labelling, picks: str | None, progress: Progress
    ) -> None:
        work = self._label_work(labelling, output, self.directory.dead_letters(name), picks)
        LabelStep(self.directory, self.config.engine, self.phases).carry_out(work, plan.units, output, progress)

    def _label_work(self, labelling: Labelling, output: Path, dead_letters: Path, picks: str | None) -> Label:
        inputs, engine = self.run.inputs, self.config.engine
        columns = [*labelling.spec.carried, *inputs.teacher_columns, *inputs.student_columns, labelling.id_column]
        return Label(
            labelling=labelling,
            output=str(output),
            dead_letters=str(dead_letters),
            columns=tuple(dict.fromkeys(column for column in columns if column is not None)),
            picks=picks,
            batch_rows=engine.batch_rows,
            max_failures=engine.max_failures,
            flush_s=engine.flush_s,
            retry=engine.retry,
        )

    def _score_work(self, student: Path, gains: Path, bought: tuple[str, ...]) -> Score:
        return Score(
            student=str(student),
            gain=self.config.selection.gain,
            output=str(gains),
            bought=bought,
            columns=self.run.inputs.student_columns,
            batch_rows=self.config.engine.batch_rows,
            trust=trusted(),
        )

    def _find_unusable(self, student: Path, gains: Path) -> FindUnusable:
        columns, batch_rows = self.run.inputs.student_columns, self.config.engine.batch_rows
        return FindUnusable(str(student), str(gains), columns, batch_rows, trusted())

    def _choice_of_round(self, number: int) -> Choice:
        bought = tuple(str(self.directory.picks(r)) for r in range(number))
        student = cached_student(str(self.directory.student(number))).fingerprint()
        method, budget = self.config.selection.method, self.config.selection.budget
        choice = self._choice(self.directory.selected(number), method, budget, bought, number, {"student": student})
        return replace(choice, labelled=partial(self._labelled_embeddings, number))

    def _labelled_embeddings(self, number: int) -> npt.NDArray[np.float32]:
        """Compute what the student of a round sees of all that has a label: the labelled set and what was bought before."""
        student, columns = cached_student(str(self.directory.student(number))), list(self.run.inputs.student_columns)
        shards = [path for r in range(number) for path in read_manifest(self.directory.labels(r)).paths()]
        tables = [
            self.run.inputs.labelled.table.select(columns),
            *(pq.read_table(path, columns=columns, page_checksum_verification=True) for path in shards),
        ]
        size = self.config.engine.batch_rows
        batches = [batch for table in tables for batch in table.to_batches(max_chunksize=size)]
        return np.concatenate([student.logits_and_embeddings(batch)[1] for batch in batches])

    def _choice(
        self,
        directory: Path,
        method: str,
        budget: int,
        bought: tuple[str, ...],
        number: int,
        digests: dict[str, str],
    ) -> Choice:
        return Choice(
            pool=self.run.inputs.pool,
            directory=directory,
            method=method,
            budget=budget,
            wrong_share=self.run.wrong_share,
            bought=bought,
            seed=self.config.run.seed,
            round=number,
            digests={"pool": self.run.inputs.pool.digest, "teacher": self.run.fingerprint, **digests},
            gain=self.config.selection.gain,
        )

    def _estimates(self, output: Path, student: Path) -> str:
        """Fit a dataset's estimates once and freeze them beside it."""
        path = output.with_name(f"{output.name}.estimates.json")
        if not path.exists():
            selection = self.config.selection
            estimates = Estimates.fit(*self.run.beside_teacher(student), selection.floor, selection.coverage)
            with replacing(path) as temporary:
                temporary.write_text(estimates.to_text())
        return path.read_text()
