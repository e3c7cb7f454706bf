"""What a run has for making and judging further students: its labelled sets, the soft labels bought, its pool."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distilbeam.pipelines.config import RunConfig
from distilbeam.pipelines.engine.display import Report
from distilbeam.pipelines.engine.phase import threads
from distilbeam.pipelines.experiments.model_metrics import Model, cost, load_model, pool_examples, quality
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.labelling.pooled_labels import is_pooled
from distilbeam.pipelines.labelling.teacher_answers import calibrated, read_answers
from distilbeam.pipelines.pool.datasets import Inputs, load_inputs
from distilbeam.pipelines.pool.labelled_sets import LabelledSet
from distilbeam.storage.files import read_json
from distilbeam.student.checkpoint import load_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import AugmentConfig, TrainConfig
from distilbeam.student.training.train import train
from distilbeam.student.trust import trust_config
from distilbeam.teacher.softlabels import read_manifest


class Material:
    """The data of a run, for students beside those of its rounds. The teacher is not asked and not loaded.

    Args:
      config: the run's configuration.
      base: directory that its relative paths are relative to.
      directory: the run directory, held by this process.
    """

    def __init__(self, config: RunConfig, base: Path, directory: RunDirectory) -> None:
        self.config, self.base, self.directory = config, base, directory
        trust_config(config.student)

    @cached_property
    def inputs(self) -> Inputs:
        """The data, planned and checked."""
        inputs = self.directory.suited(load_inputs(self.config, self.base, self.directory.former_classes()))
        frozen = self.directory.frozen
        if self.directory.moved and frozen.exists() and read_json(frozen)["inputs"] != inputs.digest:
            raise ValueError(
                f"{' and '.join(self.directory.moved)} must lead to the data that {self.directory.top} was started with, these "
                "are others; set it back or choose another run.directory"
            )
        return inputs

    @cached_property
    def soft_labels(self) -> list[Path]:
        """Soft-label datasets of the rounds that are labelled."""
        where, numbers = self.directory, range(self.config.run.rounds)
        if self.config.labels.pooled:
            return [where.pooled(number) for number in numbers if is_pooled(where.pooled(number))]
        return [where.labels(number) for number in numbers if where.summary(where.labels(number)).exists()]

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

    def require_soft_labels(self, why: str) -> None:
        """Check that a round is labelled.

        Raises:
          ValueError: none is; the message begins with `why`.
        """
        if not self.soft_labels:
            raise ValueError(
                f"{why}, but no round of {self.directory.root} is labelled yet; 'distilbeam label CONFIG' does the first"
            )

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

    def student_config(self, **changes: Any) -> StudentConfig:
        """Return the student's configuration with some settings changed and its files' paths resolved."""
        student = self.config.student
        return student.model_copy(update={"input": student.input.relative_to(self.base), **changes})

    def train(
        self,
        student: StudentConfig,
        training: TrainConfig,
        directory: Path,
        report: Report,
        *,
        labels: bool = True,
        init: Path | None = None,
        watch: Any = None,
    ) -> dict[str, float]:
        """Train a student; one that was killed goes on, one that is there is left.

        Args:
          student: what to train.
          training: how; a second phase for pools of another distribution is left out.
          directory: where it appears.
          report: shows the progress.
          labels: learn from the soft labels too; without them neither augmentation nor another objective is used, which
            is the network before learning techniques improve it.
          init: student to start from.
          watch: called before each step is shown, with nothing.

        Returns:
          The metrics of the training.
        """
        if directory.exists():
            return dict(load_student(directory).extra["metrics"])
        changes: dict[str, Any] = {"finetune": None}
        if not (labels and self.soft_labels):
            changes |= {"objective": "distill", "reestimate_epochs": None}
        if not labels:
            changes |= {"augment": AugmentConfig()}
        training = training.model_copy(update=changes)

        def progress(done: int, total: int, loss: float) -> None:
            if watch is not None:
                watch()
            report(done, total, f"loss {loss:.4f}")

        directory.parent.mkdir(parents=True, exist_ok=True)
        with threads(self.config.engine.threads or torch.get_num_threads()):
            result = train(
                student,
                training,
                classes=self.inputs.classes,
                labelled=self.inputs.labelled.table,
                label_column=self.config.data.label,
                soft_labels=self.soft_labels if labels else [],
                validation=self.inputs.validation.table,
                directory=directory,
                seed=self.config.run.seed,
                init=init,
                validation_teacher=self._calibrated_answers() if training.reestimate_epochs is not None else None,
                progress=progress,
            )
        return result.metrics

    def judge(self, directory: Path) -> dict[str, Any]:
        """Evaluate a student or an export on the validation and the test set, and measure its footprint.

        Returns:
          `validation` and, where there is a test set, `test`, as `student.evaluate.evaluate` gives them; and the
          footprint.
        """
        model = load_model(directory)
        sets = ("validation",) if self.config.data.test is None else ("validation", "test")
        return {**{name: self._quality(model, name) for name in sets}, **cost(directory, model)}

    def examples(self, rows: int) -> npt.NDArray[Any]:
        """Draw inputs of the pool to calibrate on."""
        return pool_examples(self.inputs.pool, self.student_config().input, rows, self.config.run.seed)

    def answers(self, name: str) -> npt.NDArray[np.float32] | None:
        """Return the teacher's stored log-probabilities for a labelled set, if it was asked."""
        dataset = self.directory.asked(name)
        if not self.directory.summary(dataset).exists():
            return None
        return read_answers(dataset, read_manifest(dataset).spec, self._set(name).plan.rows)

    def _calibrated_answers(self) -> npt.NDArray[np.float32] | None:
        """Return the teacher's answers for the validation set as the run's soft labels would say them."""
        answers = self.answers("validation")
        return None if answers is None else calibrated(answers, read_manifest(self.soft_labels[0]).spec.temperature)

    def _quality(self, model: Model, name: str) -> dict[str, float]:
        chosen = self._set(name)
        return quality(model, chosen.table, chosen.truth, self.answers(name))

    def _set(self, name: str) -> LabelledSet:
        chosen: LabelledSet = getattr(self.inputs, name)
        return chosen
