"""Blind distillation: a student for data that cannot be had, taught on a pool from another distribution.

    blind phase    the student learns the teacher's soft labels of the pool alone; no true class is looked at
    fine-tuning    then labelled examples of the data it is for, at a low learning rate that decays: the teacher's
                   answers for them where there are some, and their true classes

Each phase is a training of its own; a killed one goes on where it stopped, a finished one is not repeated.

References:
  Menghani, Ravi: Learning from a Teacher using Unlabeled Data, arXiv:1911.05275 (both phases).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from distilbeam.progress import Progress
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.train import TrainResult, train

SUFFIX = ".blind"


def train_blind(
    student: StudentConfig,
    training: TrainConfig,
    *,
    classes: Sequence[str],
    pool_labels: Sequence[str | Path],
    labelled: pa.Table | None,
    label_column: str,
    labelled_answers: Sequence[str | Path],
    validation: pa.Table | None,
    directory: str | Path,
    seed: int,
    mixing_weights: Sequence[float] | None = None,
    embedding: str | Path | None = None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train a student in two phases.

    Args:
      student: what to train.
      training: how; `finetune` has the second phase's settings, all others are those of both.
      classes: names of the classes in the order of the logits.
      pool_labels: soft labels of the pool, for the first phase.
      labelled: human-labelled examples for the second phase, or None.
      label_column: column of `labelled` and `validation` with the true class.
      labelled_answers: soft labels of labelled examples by the same teacher, for the second phase; may be empty.
      validation: labelled examples that choose the epoch of the second phase. The first keeps its last epoch.
      directory: where the student appears; the first phase's stays beside it, with `.blind` after the name.
      seed: as for `train`.
      mixing_weights: share of each of the pool's datasets in an epoch, as for `train`.
      embedding: table that the first phase's embeddings start from, as for `train`.
      progress: told the steps and epochs of either phase, as by `train`.

    Returns:
      The metrics and the directory of the second phase.

    Raises:
      ValueError: `finetune` or the pool's labels are missing, or as for `train`.
      FileExistsError: the directory already holds something.
    """
    if training.finetune is None:
        raise ValueError("blind distillation needs the settings of its second phase: give training.finetune")
    if not pool_labels:
        raise ValueError("blind distillation needs soft labels of the pool for its first phase, got none")
    blind = Path(directory).with_name(Path(directory).name + SUFFIX)
    if not blind.exists():
        train(
            student,
            training.model_copy(update={"finetune": None}),
            classes=classes,
            labelled=None,
            label_column=label_column,
            soft_labels=pool_labels,
            validation=None,
            directory=blind,
            seed=seed,
            mixing_weights=mixing_weights,
            embedding=embedding,
            progress=progress,
        )
    return train(
        student,
        second_phase(training),
        classes=classes,
        labelled=labelled,
        label_column=label_column,
        soft_labels=labelled_answers,
        validation=validation,
        directory=directory,
        seed=seed,
        init=blind,
        progress=progress,
    )


def second_phase(training: TrainConfig) -> TrainConfig:
    """Make the configuration of the fine-tuning: plain distillation at a low rate that falls to 0."""
    assert training.finetune is not None
    changes = {
        **training.finetune.model_dump(),
        "schedule": "cosine",
        "warmup": 0.0,
        "objective": "distill",
        "reestimate_epochs": None,
        "finetune": None,
    }
    return training.model_copy(update=changes)
