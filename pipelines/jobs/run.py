"""A run as its configuration resolves it: data, teacher and stored answers, soft labels, students, and the training of one.

`Job` carries out a run's steps on it, the experiments train and judge further students on it. All of it is read from committed
files; nothing here asks the teacher about a row, and only `fingerprint` and what needs it load it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from distilbeam.pipelines.config import RunConfig
from distilbeam.pipelines.engine.model_cache import cached_student, cached_teacher, teacher_text
from distilbeam.pipelines.engine.phase import threads
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.encoder_start import EncoderStart
from distilbeam.pipelines.jobs.weak_teacher import learns_pooled
from distilbeam.pipelines.labelling.pooled_labels import is_pooled
from distilbeam.pipelines.labelling.teacher_answers import calibrated, read_answers
from distilbeam.pipelines.pool.datasets import Inputs, load_inputs
from distilbeam.pipelines.pool.first_rows import first_rows
from distilbeam.pipelines.pool.labelled_sets import LabelledSet
from distilbeam.pipelines.sections import RunLabelsSection
from distilbeam.progress import Progress
from distilbeam.selection.trust.calibration import fit_temperature
from distilbeam.storage.files import read_json, write_json
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.blind import train_blind
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.train import TrainResult, train
from distilbeam.student.trust import trust_config
from distilbeam.teacher.softlabels import SoftLabelSpec, read_manifest
from distilbeam.teacher.tfserving.probing import with_probe_shape


class Run:
    """What a run's configuration resolves to in its directory.

    Args:
      config: the configuration, with absolute paths.
      directory: the run directory, held by this process where anything is written.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory) -> None:
        self.config, self.directory = config, directory
        trust_config(config.student)

    @cached_property
    def inputs(self) -> Inputs:
        """The data, planned and checked."""
        return self.directory.suited(load_inputs(self.config, self.directory.former_classes()))

    def labelled_set(self, name: str) -> LabelledSet:
        """Return the labelled, validation or test set."""
        chosen: LabelledSet = getattr(self.inputs, name)
        return chosen

    def truth(self, name: str) -> npt.NDArray[np.int64]:
        """Return the class indices of a labelled set, int64 [rows]."""
        return self.labelled_set(name).truth

    @cached_property
    def teacher(self) -> str:
        """The teacher as text that travels to workers."""
        columns = self.config.teacher.input.columns
        told = with_probe_shape(self.config.teacher, first_rows(lambda: self.inputs.pool, columns))
        return teacher_text(told, self.inputs.classes)

    @cached_property
    def fingerprint(self) -> str:
        """The teacher's fingerprint."""
        return cached_teacher(self.teacher).fingerprint()

    # the teacher's stored answers

    def was_asked(self, name: str) -> bool:
        """Tell whether the teacher was asked about all of a labelled set."""
        return self.directory.summary(self.directory.asked(name)).exists()

    def answers(self, name: str) -> npt.NDArray[np.float32]:
        """Return the teacher's log-probabilities for a labelled set that it was asked about.

        Returns:
          float32 [rows, classes], NaN where it had no answer.
        """
        dataset = self.directory.asked(name)
        return read_answers(dataset, read_manifest(dataset).spec, self.labelled_set(name).plan.rows)

    def calibrated_answers(self, name: str) -> npt.NDArray[np.float32]:
        """Return the log-probabilities of `answers` as soft labels of the pool would say them."""
        return calibrated(self.answers(name), self.temperature)

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

    @property
    def wrong_share(self) -> float:
        """Share of wrong teacher labels on the validation set: the k / n of Robust Active Distillation."""
        answers = self.answers("validation")
        answered = ~np.isnan(answers).any(axis=1)
        wrong = answers[answered].argmax(axis=1) != self.truth("validation")[answered]
        return float(wrong.mean())

    def beside_teacher(
        self, student: Path
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Put a student beside the teacher on the validation rows that the teacher answered.

        Returns:
          The teacher's calibrated log-probabilities float32 [n, C], the student's logits float32 [n, C], and the true classes
          int64 [n].
        """
        answers = self.calibrated_answers("validation")
        answered = ~np.isnan(answers).any(axis=1)
        logits = self.student_logits(student, "validation")
        return answers[answered], logits[answered], self.truth("validation")[answered]

    # soft labels

    def asked_spec(self, name: str) -> SoftLabelSpec:
        """The form of the answers for a labelled set: calibration is fitted on them, but the labelled one's are learned."""
        spec = self._spec(RunLabelsSection(), self.temperature if name == "labelled" else 1.0)
        # what else is carried is the pool's
        return replace(spec, carried=tuple(dict.fromkeys(self.inputs.student_columns)))

    @property
    def label_spec(self) -> SoftLabelSpec:
        """The form of the pool's soft labels."""
        return self._spec(self.config.labels, self.temperature)

    @property
    def sample_spec(self) -> SoftLabelSpec:
        """The form of the answers to the samples of `plan`: dense, before there is a temperature."""
        return replace(self._spec(self.config.labels, 1.0), kind="dense", k=None)

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

    @property
    def sampled(self) -> Path:
        """Dense answers to the samples of `plan`, which no round asks again."""
        return self.directory.top / "sampled"

    @property
    def pooled(self) -> bool:
        """Whether students learn pooled labels."""
        return learns_pooled(self.config.labels.pooled, self.directory)

    @cached_property
    def soft_labels(self) -> list[Path]:
        """Soft-label datasets of the rounds that are labelled, in the form that students learn."""
        where, numbers = self.directory, range(self.config.run.rounds)
        if self.pooled:
            return [where.pooled(number) for number in numbers if is_pooled(where.pooled(number))]
        return [where.labels(number) for number in numbers if where.summary(where.labels(number)).exists()]

    def require_soft_labels(self, why: str) -> None:
        """Check that a round is labelled.

        Raises:
          ValueError: none is; the message begins with `why`.
        """
        if not self.soft_labels:
            raise ValueError(
                f"{why}, but no round of {self.directory.root} is labelled yet; 'distilbeam label CONFIG' does the first"
            )

    @cached_property
    def digest(self) -> str:
        """Hash of the data and of the soft labels that students are made from."""
        keys = [entry.key for dataset in self.soft_labels for entry in read_manifest(dataset).entries]
        return hashlib.blake2b("\n".join([self.inputs.digest, *keys]).encode(), digest_size=8).hexdigest()

    def provenance(self, student: Path | None = None) -> dict[str, Any]:
        """Describe what a student is made from: the soft labels' specification, with the teacher, and the datasets.

        Args:
          student: one of the run's own, which learned from the rounds before it; None for one made from all rounds.
        """
        numbers = {self.directory.student(number): number for number in range(self.config.run.rounds + 1)}
        datasets = self.soft_labels if student is None else self.soft_labels[: numbers[student]]
        spec = json.loads(read_manifest(datasets[0]).spec.to_json()) if datasets else None
        names = [str(dataset.relative_to(self.directory.top)) for dataset in datasets]
        return {"data": self.inputs.digest, "soft_labels": {"datasets": names, "spec": spec}}

    # students

    @property
    def comparison(self) -> RunDirectory:
        """The directory of the comparison with as many uniformly chosen labels."""
        return self.directory.uniform_with(self.config.selection.budget * self.config.run.rounds)

    def last_student(self, number: int | None = None) -> Path:
        """Find the student of a round, or of the last round that has one.

        Raises:
          ValueError: there is none.
        """
        numbers = range(self.config.run.rounds, -1, -1) if number is None else [number]
        for candidate in map(self.directory.student, numbers):
            if candidate.exists():
                return candidate
        which = "no student" if number is None else f"no student of round {number}"
        raise ValueError(f"{self.directory.root} has {which} yet; 'distilbeam train CONFIG' trains the first")

    def student_logits(self, student: Path, name: str) -> npt.NDArray[np.float32]:
        """Return a student's logits for a labelled set, float32 [rows, classes]."""
        table = self.labelled_set(name).table.select(self.inputs.student_columns)
        batches = table.to_batches(max_chunksize=self.config.engine.batch_rows)
        return np.concatenate([cached_student(str(student)).logits(batch) for batch in batches])

    def student_config(self, **changes: Any) -> StudentConfig:
        """Return the student's configuration with some settings changed and its files' paths resolved: workers start elsewhere."""
        student = self.config.student
        return student.model_copy(update=changes)

    def encoder_start(self, student: StudentConfig) -> EncoderStart:
        """What students of a configuration with `init` encoder start from."""
        engine = self.config.engine
        return EncoderStart(self.directory, lambda: self.inputs, student, self.config.run.seed, engine.batch_rows)

    def embedding(self, student: StudentConfig) -> Path | None:
        """Give the table that a student's embeddings start from, fitted where it is not there; None for random ones."""
        return self.encoder_start(student).fit() if student.init == "encoder" else None

    def train(
        self,
        directory: Path,
        soft_labels: list[Path],
        progress: Progress,
        *,
        student: StudentConfig | None = None,
        training: TrainConfig | None = None,
        init: Path | None = None,
        labelled: pa.Table | None = None,
        held_out: bool = True,
        validation: pa.Table | None = None,
        pseudo_labels: Sequence[Path] = (),
        last_epoch: int | None = None,
        seed: int | None = None,
    ) -> TrainResult:
        """Train a student on the labelled set and on soft labels; one that was killed goes on.

        Args:
          directory: where it appears.
          soft_labels: datasets to learn from; without any the labelled set is all.
          progress: shows the progress.
          student: what to train; the configuration's by default.
          training: how; the configuration's by default.
          init: student to start from.
          labelled: human-labelled rows; the labelled set by default.
          held_out: whether the validation set chooses the epoch.
          validation: rows that choose it instead.
          pseudo_labels: datasets of students' own labels.
          last_epoch: epoch after which training stops; see `student.training.train`.
          seed: the run's by default.

        Returns:
          The metrics and the directory.
        """
        student, training = student or self.student_config(), training or self.config.training
        common: dict[str, Any] = {
            "classes": self.inputs.classes,
            "labelled": self.inputs.labelled.table if labelled is None else labelled,
            "label_column": self.config.data.label,
            "validation": (self.inputs.validation.table if validation is None else validation) if held_out else None,
            "directory": directory,
            "seed": self.config.run.seed if seed is None else seed,
            "progress": progress,
        }
        with threads(self.config.engine.threads or torch.get_num_threads()):
            if training.finetune is not None and soft_labels:
                answers = [self.directory.asked("labelled")]
                common |= {"embedding": self.embedding(student)}
                return train_blind(student, training, pool_labels=soft_labels, labelled_answers=answers, **common)
            # weights are estimated of the teacher's labels, on rows that are held out
            if pseudo_labels or not held_out or validation is not None:
                training = training.model_copy(update={"reestimate_epochs": None})
            again = training.reestimate_epochs is not None and soft_labels
            teacher = self.calibrated_answers("validation") if again else None
            training = training.model_copy(update={"finetune": None})
            common |= {"pseudo_labels": pseudo_labels, "last_epoch": last_epoch, "init": init}
            common |= {"embedding": None if init is not None else self.embedding(student)}
            return train(student, training, soft_labels=soft_labels, validation_teacher=teacher, **common)
