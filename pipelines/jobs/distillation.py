"""The steps of a run: what each does and when it is done.

Every step reads committed files and commits files, so that a killed step is repeated and a finished one skipped. Nothing
else is state.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines.acquisition.score import Score, gains_file
from distilbeam.pipelines.acquisition.select import Choice, choose
from distilbeam.pipelines.acquisition.unusable_rows import (
    gather_unusable,
    unusable_directory,
    unusable_list,
    unusable_sentence,
)
from distilbeam.pipelines.config import RunConfig, RunLabelsSection
from distilbeam.pipelines.engine.display import Report
from distilbeam.pipelines.engine.model_cache import cached_student, cached_teacher, teacher_text
from distilbeam.pipelines.engine.phase import PhaseReport, run_phase, threads
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.teacher_check import require_order
from distilbeam.pipelines.jobs.work_log import add_work, with_counts_of
from distilbeam.pipelines.labelling.dead_letters import ask_again, drop_answered, leave, none_answered_sentence
from distilbeam.pipelines.labelling.label_quality import Estimates
from distilbeam.pipelines.labelling.label_rows import Labelling
from distilbeam.pipelines.labelling.phase import Label
from distilbeam.pipelines.labelling.pooled_labels import is_pooled, pool_labels
from distilbeam.pipelines.labelling.shard_plan import Task, plan_shards
from distilbeam.pipelines.labelling.teacher_answers import calibrated, count_dead_letters, read_answers, tally
from distilbeam.pipelines.pool.content_digests import content_digests
from distilbeam.pipelines.pool.datasets import Inputs, load_inputs
from distilbeam.pipelines.pool.first_rows import first_rows
from distilbeam.pipelines.pool.labelled_sets import LabelledSet
from distilbeam.pipelines.pool.splits import Pool
from distilbeam.selection.trust.calibration import fit_temperature
from distilbeam.selection.trust.pooling import BeliefPool
from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import read_json, write_json
from distilbeam.student.training.blind import train_blind
from distilbeam.student.training.train import train
from distilbeam.student.trust import trust_config, trusted
from distilbeam.teacher.softlabels import SoftLabelSpec, committed, read_manifest
from distilbeam.teacher.tfserving.probing import with_probe_shape

log = logging.getLogger(__name__)


class Job:
    """A run of one configuration in one directory.

    Args:
      config: the configuration.
      base: directory that relative paths are relative to.
      directory: the run directory, held by this process.
      options: Beam's options for the phases.
    """

    def __init__(self, config: RunConfig, base: Path, directory: RunDirectory, options: PipelineOptions) -> None:
        self.config, self.base, self.directory, self.options = config, base, directory, options
        trust_config(config.student)

    @cached_property
    def inputs(self) -> Inputs:
        """The data, planned and checked."""
        return self.directory.suited(load_inputs(self.config, self.base, self.directory.former_classes()))

    @cached_property
    def teacher(self) -> str:
        """The teacher as text that travels to workers."""
        columns = self.config.teacher.input.columns
        told = with_probe_shape(self.config.teacher, self.base, first_rows(lambda: self.inputs.pool, columns))
        return teacher_text(told, self.base, self.inputs.classes)

    @cached_property
    def fingerprint(self) -> str:
        """The teacher's fingerprint."""
        return cached_teacher(self.teacher).fingerprint()

    def freeze(self, check_content: bool = False) -> None:
        """Record which data and which teacher the run belongs to, or check that they are still the same.

        Args:
          check_content: read all files of the pool, not only those that were touched since.

        Raises:
          ValueError: the data or the teacher changed since the run was started.
        """
        contents = content_digests(self.inputs.pool, self.directory.digest_cache, check_content)
        now: dict[str, Any] = {
            "inputs": self.inputs.files_digest,
            "pool": self.inputs.pool.digest,
            "sets": self.inputs.rows_digests,
            "files": dict(self.inputs.pool.files),
            "teacher": self.fingerprint,
            "classes": list(self.inputs.classes),
            "contents": contents,
        }
        path = self.directory.frozen
        if not path.exists():
            write_json(path, now)
        then = self._with_mended_files(read_json(path), now)
        if then["teacher"] != now["teacher"]:
            raise ValueError(
                f"the teacher changed: {self.directory.root} was started with {then['teacher']}, the configuration now "
                f"names {now['teacher']}; put the former back or choose another run.directory"
            )
        if changed := _changed_data(then, now):
            raise ValueError(
                f"the data changed since {self.directory.root} was started: {changed}; put it back or choose another run.directory"
            )
        if "sets" not in then:
            log.warning(
                "%s was started by an earlier version, which did not record the rows of the labelled sets: whether they were "
                "changed until now cannot be told",
                self.directory.root,
            )
        if "sets" not in then or "contents" not in then:
            write_json(path, {**then, **{name: now[name] for name in ("pool", "sets", "contents")}})

    def _with_mended_files(self, then: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
        """Take pool files of other values as long as nothing was chosen by them: one that was damaged may be put right."""
        known = then.get("contents", {})
        mended = {name for name, digest in now["contents"].items() if known.get(name, digest) != digest}
        where = self.directory
        if not mended or then.get("pool") != now["pool"] or (where.selected(0) / "plan.json").exists():
            return then
        log.warning(
            "%s: values changed before anything was chosen, its rows are scored again", ", ".join(sorted(mended))
        )
        paths = {path for name, path in self.inputs.pool.paths if name in mended}
        for unit in self.inputs.pool.units:
            if unit.path in paths:
                gains_file(where.gains(0), unit).unlink(missing_ok=True)
        taken = {**then, "contents": now["contents"]}
        write_json(where.frozen, taken)
        return taken

    def changed_files(self) -> list[str]:
        """Read all files of the pool and list those that are not what the run was started with."""
        then = read_json(self.directory.frozen).get("contents", {})
        now = content_digests(self.inputs.pool, self.directory.digest_cache, check_all=True)
        return [name for name, digest in now.items() if then.get(name, digest) != digest]

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

    def train(self, number: int, report: Report) -> None:
        """Train the student on the labelled set and the soft labels of the first `number` rounds."""
        where = self.directory
        datasets = [self._to_learn(where, r, where.chooser(r)) for r in range(number)]
        self._train(where.student(number), datasets, report)

    def ask(self, name: str, report: Report) -> None:
        """Ask the teacher about the labelled, the validation or the test set.

        Raises:
          ValueError: after the validation set: the teacher is at chance, or its outputs are in another order.
        """
        if name != "validation":
            self.check_teacher()
        labelling = Labelling(self.teacher, self._asked_spec(name), teacher_batch=self.config.engine.teacher_batch)
        self._label(self.directory.asked(name), f"ask-{name}", self.labelled_set(name).plan, labelling, None, report)
        if name == "validation":
            self.check_teacher()

    def check_teacher(self) -> None:
        """Stop where buying the teacher's labels is a mistake by what it answered for the validation set.

        Raises:
          ValueError: it is at chance, or its outputs are in another order than the classes.
        """
        if self.config.data.check_classes:
            rng = np.random.default_rng(self.config.run.seed)
            require_order(self.answers("validation"), self.truth("validation"), self.inputs.classes, rng)

    def select(self, number: int, report: Report) -> None:
        """Score what is left of the pool with the current student, solve the game, choose."""
        self.check_teacher()
        choice = self._choice_of_round(number)
        if choice.scored is not None:
            score = self._score_work(self.directory.student(number), choice.gains, choice.bought)
            candidates = choice.candidates(self.inputs.pool.rows - choice.budget * number)
            score = replace(score, gain=choice.scored, candidates=candidates)
            done = self._phase("score", score, self.inputs.pool.units, report)
            add_work(self.directory.work, "score", done)
            if unusable := gather_unusable(choice.gains, self.inputs.pool.units):
                log.warning(unusable_sentence(unusable, unusable_list(choice.gains)))
        choose(choice)

    def label(self, number: int, report: Report) -> None:
        """Ask the teacher about the rows that a round chose."""
        self.check_teacher()
        picks, student = self.directory.picks(number), self.directory.student(number)
        reuse = tuple(map(str, self.directory.bought_elsewhere(number)))
        self._label_picks(self.directory.labels(number), f"round={number:03d}", picks, student, reuse, report)

    def compare(self, report: Report) -> None:
        """Train the same student on as many uniformly chosen labels; answers that were bought already are not asked again."""
        self.check_teacher()
        where, rounds, student = self.comparison, self.config.run.rounds, self.directory.chooser(0)
        if not where.summary(where.labels(0)).exists():
            unusable = tuple(str(unusable_directory(self.directory.gains(r))) for r in range(rounds))
            choice = self._choice(
                where.selected(0), "uniform", self.config.selection.budget * rounds, unusable, rounds, {}
            )
            choose(choice)
            bought = [*(self.directory.labels(r) for r in range(rounds)), *self.directory.bought_elsewhere(rounds)]
            self._label_picks(where.labels(0), where.root.name, choice.picks, student, tuple(map(str, bought)), report)
        self._train(where.student(1), [self._to_learn(where, 0, student)], report)

    @property
    def comparison(self) -> RunDirectory:
        """The directory of the comparison with as many uniformly chosen labels."""
        return self.directory.uniform_with(self.config.selection.budget * self.config.run.rounds)

    def sample_work(self, output: Path, dead_letters: Path) -> Label:
        """Return the label phase's work for any rows of the pool, uncalibrated and without estimates, into given directories."""
        labelling = Labelling(
            self.teacher,
            self.sample_spec,
            id_column=self.config.data.id,
            teacher_batch=self.config.engine.teacher_batch,
        )
        return self._label_work(labelling, output, dead_letters, None)

    def sample_score(self, student: Path, gains: Path) -> Score:
        """Return the score phase's work with a student, into a given directory."""
        return self._score_work(student, gains, ())

    def answers(self, name: str) -> npt.NDArray[np.float32]:
        """Return the teacher's log-probabilities for the validation or the test set.

        Returns:
          float32 [rows, classes], NaN where it had no answer.
        """
        return read_answers(self.directory.asked(name), self._asked_spec(name), self.labelled_set(name).plan.rows)

    def truth(self, name: str) -> npt.NDArray[np.int64]:
        """Return the class indices of a labelled set, int64 [rows]."""
        return self.labelled_set(name).truth

    def student_logits(self, student: Path, name: str) -> npt.NDArray[np.float32]:
        """Return a student's logits for a labelled set, float32 [rows, classes]."""
        table = self.labelled_set(name).table.select(self.inputs.student_columns)
        batches = table.to_batches(max_chunksize=self.config.engine.batch_rows)
        return np.concatenate([cached_student(str(student)).logits(batch) for batch in batches])

    @cached_property
    def temperature(self) -> float:
        """What the teacher's logits are divided by in soft labels of the pool."""
        chosen = self.config.labels.temperature
        return float(self.calibration["temperature"]) if chosen == "calibrated" else chosen

    @cached_property
    def calibration(self) -> dict[str, Any]:
        """The temperature that fits the validation set best, fitted once: another one would be another label.

        Its keys are those of `selection.calibration.Calibration`.
        """
        path = self.directory.calibration
        if not path.exists():
            answers = self.answers("validation")
            answered = ~np.isnan(answers).any(axis=1)
            write_json(path, fit_temperature(answers[answered], self.truth("validation")[answered])._asdict())
        fitted: dict[str, Any] = read_json(path)
        return fitted

    def calibrated_answers(self, name: str) -> npt.NDArray[np.float32]:
        """Return the log-probabilities of `answers` as soft labels of the pool would say them."""
        return calibrated(self.answers(name), self.temperature)

    @property
    def sampled(self) -> Path:
        """Dense answers to the samples of `plan`, which no round asks again."""
        return self.directory.top / "sampled"

    @property
    def sample_spec(self) -> SoftLabelSpec:
        """How these are stored."""
        return replace(self._spec(self.config.labels, 1.0), kind="dense", k=None)

    @property
    def wrong_share(self) -> float:
        """Share of wrong teacher labels on the validation set: the k / n of Robust Active Distillation."""
        answers = self.answers("validation")
        answered = ~np.isnan(answers).any(axis=1)
        wrong = answers[answered].argmax(axis=1) != self.truth("validation")[answered]
        return float(wrong.mean())

    def _to_learn(self, where: RunDirectory, number: int, student: Path) -> Path:
        """Give the labels of a round that a student is to learn: the stored ones, or those pooled with its chooser's."""
        if not self.config.labels.pooled:
            return where.labels(number)
        if not is_pooled(where.pooled(number)):
            answers, truth = self.calibrated_answers("validation"), self.truth("validation")
            answered = ~np.isnan(answers).any(axis=1)
            logits = self.student_logits(student, "validation")
            beliefs = BeliefPool.fit(answers[answered], logits[answered], truth[answered])
            pool_labels(where.labels(number), where.pooled(number), student, beliefs)
        return where.pooled(number)

    def _train(self, directory: Path, soft_labels: list[Path], report: Report) -> None:
        student, training = self.config.student, self.config.training
        student = student.model_copy(update={"input": student.input.relative_to(self.base)})  # workers start elsewhere
        common: dict[str, Any] = {
            "classes": self.inputs.classes,
            "labelled": self.inputs.labelled.table,
            "label_column": self.config.data.label,
            "validation": self.inputs.validation.table,
            "directory": directory,
            "seed": self.config.run.seed,
            "progress": lambda done, total, loss: report(done, total, f"loss {loss:.4f}"),
        }
        with threads(self.config.engine.threads or torch.get_num_threads()):
            if training.finetune is not None and soft_labels:
                answers = [self.directory.asked("labelled")]
                train_blind(student, training, pool_labels=soft_labels, labelled_answers=answers, **common)
                return
            again = training.reestimate_epochs is not None and soft_labels
            teacher = self.calibrated_answers("validation") if again else None
            training = training.model_copy(update={"finetune": None})
            train(student, training, soft_labels=soft_labels, validation_teacher=teacher, **common)

    def _label_picks(
        self, output: Path, name: str, picks: Path, student: Path, reuse: tuple[str, ...], report: Report
    ) -> None:
        labelling = Labelling(
            teacher=self.teacher,
            spec=self._spec(self.config.labels, self.temperature),
            id_column=self.config.data.id,
            teacher_batch=self.config.engine.teacher_batch,
            estimates=self._estimates(output, student),
            student=str(student),
            trust=trusted(),
            reuse=(*reuse, *([str(self.sampled)] if self.sampled.exists() else [])),
        )
        self._label(output, name, self.inputs.pool, labelling, str(picks), report)

    def _label(
        self, output: Path, name: str, plan: Pool, labelling: Labelling, picks: str | None, report: Report
    ) -> None:
        dead_letters = self.directory.dead_letters(name)
        work = self._label_work(labelling, output, dead_letters, picks)
        engine = self.config.engine
        tasks = plan_shards(plan.units, picks, engine.shard_rows, labelling.spec, engine.shard_bytes)
        again = self._again(dead_letters, plan, picks, labelling, output)
        done = self._phase("label", work, [*tasks, *again], report)
        drop_answered(dead_letters, committed(output))
        add_work(self.directory.work, "label", with_counts_of(done, output, [*tasks, *again]))
        failed = count_dead_letters(dead_letters)
        if failed == sum(task.rows for task in tasks):
            raise ValueError(none_answered_sentence(dead_letters, failed))
        write_json(self.directory.summary(output), tally(output, failed))

    def _again(
        self, dead_letters: Path, plan: Pool, picks: str | None, labelling: Labelling, output: Path
    ) -> list[Task]:
        """Plan to ask again about the rows that failed, unless they are to be left."""
        done, engine = committed(output), self.config.engine
        if engine.retry:
            return ask_again(dead_letters, plan.units, picks, engine.shard_rows, labelling.spec, done)
        leave(dead_letters, done)
        return []

    def _label_work(self, labelling: Labelling, output: Path, dead_letters: Path, picks: str | None) -> Label:
        inputs, engine = self.inputs, self.config.engine
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
            columns=self.inputs.student_columns,
            batch_rows=self.config.engine.batch_rows,
            trust=trusted(),
        )

    def _phase(self, name: str, work: Any, items: Any, report: Report) -> PhaseReport:
        return run_phase(
            name,
            work,
            items,
            errors=self.directory.errors(name),
            options=self.options,
            progress=report,
            attempts=self.config.engine.attempts,
        )

    def _choice_of_round(self, number: int) -> Choice:
        bought = tuple(str(self.directory.picks(r)) for r in range(number))
        student = cached_student(str(self.directory.student(number))).fingerprint()
        method, budget = self.config.selection.method, self.config.selection.budget
        choice = self._choice(self.directory.selected(number), method, budget, bought, number, {"student": student})
        return replace(choice, labelled=partial(self._labelled_embeddings, number))

    def _labelled_embeddings(self, number: int) -> npt.NDArray[np.float32]:
        """Compute what the student of a round sees of all that has a label: the labelled set and what was bought before."""
        student, columns = cached_student(str(self.directory.student(number))), list(self.inputs.student_columns)
        shards = [path for r in range(number) for path in read_manifest(self.directory.labels(r)).paths()]
        tables = [
            self.inputs.labelled.table.select(columns),
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
            pool=self.inputs.pool,
            directory=directory,
            method=method,
            budget=budget,
            wrong_share=self.wrong_share,
            bought=bought,
            seed=self.config.run.seed,
            round=number,
            digests={"pool": self.inputs.pool.digest, "teacher": self.fingerprint, **digests},
            gain=self.config.selection.gain,
        )

    def _asked_spec(self, name: str) -> SoftLabelSpec:
        """The form of the answers for a labelled set: calibration is fitted on them, but the labelled one's are learned."""
        spec = self._spec(RunLabelsSection(), self.temperature if name == "labelled" else 1.0)
        return replace(
            spec, carried=tuple(dict.fromkeys(self.inputs.student_columns))
        )  # what else is carried is the pool's

    def _spec(self, labels: RunLabelsSection, temperature: float) -> SoftLabelSpec:
        return SoftLabelSpec(
            num_classes=len(self.inputs.classes),
            kind=labels.kind,
            k=labels.k,
            temperature=temperature,
            storage=labels.storage,
            classes=self.inputs.classes,
            teacher=self.fingerprint,
            carried=self.inputs.carried,
        )

    def labelled_set(self, name: str) -> LabelledSet:
        """Return the labelled, validation or test set."""
        chosen: LabelledSet = getattr(self.inputs, name)
        return chosen

    def _estimates(self, output: Path, student: Path) -> str:
        """Fit a dataset's estimates once and freeze them beside it."""
        path = output.with_name(f"{output.name}.estimates.json")
        if not path.exists():
            answers, truth = self.calibrated_answers("validation"), self.truth("validation")
            answered = ~np.isnan(answers).any(axis=1)
            logits = self.student_logits(student, "validation")
            selection = self.config.selection
            estimates = Estimates.fit(
                answers[answered], logits[answered], truth[answered], selection.floor, selection.coverage
            )
            with replacing(path) as temporary:
                temporary.write_text(estimates.to_text())
        return path.read_text()


def _changed_data(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name what changed since a run was started; nothing where all is the same."""
    if then["classes"] != now["classes"]:
        return "the classes of the labelled sets"
    if "sets" in then:
        sets = [name for name, digest in now["sets"].items() if digest != then["sets"].get(name)]
        if then["pool"] == now["pool"]:
            known = then.get("contents", {})
            values = [name for name, digest in now["contents"].items() if known.get(name, digest) != digest]
            return ", ".join(sets + [f"values in pool file {name}" for name in values[:3]])
    elif then["inputs"] == now["inputs"]:
        return ""
    files = sorted({name for name, _ in {*then["files"].items()} ^ {*now["files"].items()}})
    return f"pool file(s) {', '.join(files)}" if files else "a labelled set"
