"""A run of a language model as its configuration resolves it: data, teacher, forms of labels, students, and the training of one.

What `jobs/run.py` is to runs of classifiers. All of it is read from committed files; nothing here asks the teacher about a block.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.pipelines.engine.model_cache import cached_language_model, cached_teacher
from distilbeam.pipelines.engine.phase import threads
from distilbeam.pipelines.jobs.blocks import Blocks
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.language.inputs import TokenInputs, load_token_inputs
from distilbeam.pipelines.sections import LabelsSection
from distilbeam.pipelines.token_config import TokenRunConfig
from distilbeam.progress import Progress
from distilbeam.student.checkpoint import WEIGHTS
from distilbeam.student.language.config import TokenTrainConfig
from distilbeam.student.language.folder import LanguageModel
from distilbeam.student.language.train import train_language_model
from distilbeam.student.language.untrained import write_untrained
from distilbeam.student.own_files import content_of_file
from distilbeam.student.training.train import TrainResult
from distilbeam.student.trust import trust, trusted
from distilbeam.teacher.backends.torch import find_device
from distilbeam.teacher.softlabels import SoftLabelSpec

POOL = "pool"


class TokenRun:
    """What the configuration of a run of a language model resolves to in its directory.

    Args:
      config: the configuration, with absolute paths.
      directory: the run directory, held by this process where anything is written.
    """

    def __init__(self, config: TokenRunConfig, directory: RunDirectory) -> None:
        self.config, self.directory = config, directory
        if config.student.factory is not None:
            trust(config.student.factory)

    @cached_property
    def inputs(self) -> TokenInputs:
        """The data, planned and checked."""
        return load_token_inputs(self.config, self.directory.digest_cache)

    @property
    def held_out_labels(self) -> LabelsSection:
        """The form of the labels of held-out blocks, by which students are compared with the teacher: its most probable tokens."""
        return LabelsSection(kind="top_k", k=self.config.labels.held_out_k, storage=self.config.labels.storage)

    def blocks(self, name: str) -> Blocks:
        """What is known of a set of blocks: the pool's, or a held-out one's by its name."""
        labels = self.config.labels if name == POOL else self.held_out_labels
        return Blocks(self.config.teacher, labels, f"data.{name}")

    def teacher(self, name: str = POOL) -> str:
        """The teacher as text that travels to workers, with the form in which it answers to a set of blocks."""
        return self.blocks(name).teacher_text(self.inputs.pool if name == POOL else self.inputs.held_out[name])

    def spec(self, name: str = POOL) -> SoftLabelSpec:
        """The specification of a set's labels; loads the teacher."""
        if name not in self._specs:
            plan = self.inputs.pool if name == POOL else self.inputs.held_out[name]
            self._specs[name] = self.blocks(name).spec(self.teacher(name), plan)
        return self._specs[name]

    @cached_property
    def _specs(self) -> dict[str, SoftLabelSpec]:
        return {}

    @cached_property
    def fingerprint(self) -> str:
        """The teacher's fingerprint; every set of blocks and the student must be of its tokenizer.

        Raises:
          ValueError: one is not.
        """
        for name in (POOL, *self.inputs.held_out):
            spec = self.spec(name)
        student = self.config.student
        tokenizer = load_tokenizer(student.tokenizer or str(student.model), "student.tokenizer")
        tokenizer.require_same(str(spec.tokenizer), spec.num_classes, "the teacher")
        return cached_teacher(self.teacher()).fingerprint()

    @property
    def device(self) -> str:
        """Where students compute, as it is named in the configuration."""
        return self.config.training.device

    def language_model(self, student: Path) -> LanguageModel:
        """Open one of the run's students, on the device of the training."""
        return cached_language_model(str(student), str(find_device(self.device, "training.device")), trusted())

    def chooser_digest(self, student: Path) -> str:
        """Identify the weights of a student, whenever they were trained."""
        files = sorted(student.glob("*.safetensors")) or [student / WEIGHTS]
        return hashlib.blake2b("".join(map(content_of_file, files)).encode(), digest_size=8).hexdigest()

    def own_threads(self) -> AbstractContextManager[None]:
        """Keep training and measuring to the threads of the configuration; torch's own choice without one."""
        return threads(self.config.engine.threads or torch.get_num_threads())

    # students

    @property
    def comparison(self) -> RunDirectory:
        """The directory of the comparison with as many uniformly chosen blocks."""
        return self.directory.uniform_with(self.inputs.budget * self.config.run.rounds)

    @property
    def plain(self) -> RunDirectory:
        """The directory of the comparison with students of the text alone."""
        return RunDirectory(self.directory.root / "plain")

    @property
    def soft_labels(self) -> list[Path]:
        """Labels of the rounds that are labelled."""
        where, numbers = self.directory, range(self.config.run.rounds)
        return [where.labels(number) for number in numbers if where.summary(where.labels(number)).exists()]

    def write_first(self, directory: Path) -> None:
        """Write student 0, with the weights that every training of the run begins with."""
        write_untrained(self.config.student, self.spec(), directory, self.config.run.seed)

    def train(self, directory: Path, soft_labels: list[Path], progress: Progress, **changes: Any) -> TrainResult:
        """Train a student from the first weights on; one that was killed goes on.

        Args:
          directory: where it appears.
          soft_labels: datasets to learn from.
          progress: shows the progress.
          **changes: settings of the training that differ from the run's.
        """
        training: TokenTrainConfig = self.config.training.model_copy(update=changes)
        with self.own_threads():
            return train_language_model(
                self.config.student,
                training,
                soft_labels=soft_labels,
                directory=directory,
                seed=self.config.run.seed,
                validation=self.directory.asked("validation"),
                progress=progress,
            )
