"""What a training reads: soft labels that suit the student, the shape of its inputs, and how rows are dealt out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distilbeam.student.config import StudentConfig
from distilbeam.student.data import SoftLabelDataset
from distilbeam.student.labelled import Examples
from distilbeam.student.train_config import TrainConfig

EXTRA_COLUMNS = {
    "distill": (),
    "weighted": ("weight",),
    "slam": ("alpha", "candidates"),
    "slam+weighted": ("alpha", "candidates", "weight"),
}


def open_soft_labels(
    paths: Sequence[str | Path],
    student: StudentConfig,
    training: TrainConfig,
    classes: Sequence[str],
    hard: Examples | None,
    seed: int,
) -> SoftLabelDataset | None:
    """Open soft labels for a training; their share of a batch is their share of all rows.

    Args:
      paths: directories of datasets.
      student: the student's configuration.
      training: its training's configuration.
      classes: names of the student's classes.
      hard: the human-labelled rows, or None.
      seed: of the order.

    Returns:
      The dataset, or None when there are no soft labels.

    Raises:
      ValueError: there is nothing to train on, or the labels do not suit the classes or the objective.
    """
    if not paths:
        if hard is None:
            raise ValueError("training needs labelled examples or soft labels, got neither")
        return None
    columns = EXTRA_COLUMNS[training.objective]
    dataset = SoftLabelDataset(paths, training.batch_size, seed, input=student.input, columns=columns)
    spec = dataset.spec
    if spec.num_classes != len(classes):
        raise ValueError(f"the soft labels must have the student's {len(classes)} classes, got {spec.num_classes}")
    if spec.classes is not None and tuple(spec.classes) != tuple(classes):
        index = next(i for i, pair in enumerate(zip(spec.classes, classes, strict=True)) if pair[0] != pair[1])
        raise ValueError(
            f"the soft labels must have the student's classes in their order, class {index} is {spec.classes[index]!r} "
            f"there and {classes[index]!r} here"
        )
    if missing := [name for name in columns if name not in dataset.scalar_columns]:
        raise ValueError(
            f"objective {training.objective!r} needs the columns {' and '.join(missing)} beside the soft labels; label "
            "with a validation set, which they are estimated from, or choose objective 'distill'"
        )
    share = dataset.rows / (dataset.rows + (0 if hard is None else len(hard)))
    dataset.batch_size = max(1, round(training.batch_size * share))
    return dataset


def steps_per_epoch(training: TrainConfig, hard: Examples | None, soft: SoftLabelDataset | None) -> int:
    """Count the steps in which every row is visited once."""
    if soft is not None:
        return len(soft)
    assert hard is not None
    return math.ceil(len(hard) / training.batch_size)


def deal_out(hard: Examples | None, steps: int, seed: int, epoch: int) -> list[Tensor]:
    """Deal the human-labelled rows out over an epoch's steps."""
    if hard is None:
        return []
    rows = np.random.default_rng([seed, epoch, len(hard)]).permutation(len(hard))
    return [torch.from_numpy(part) for part in np.array_split(rows, steps)]


def shape_of_inputs(hard: Examples | None, held_out: Examples | None, soft: SoftLabelDataset | None) -> tuple[int, ...]:
    """Give the shape of one example's input, which all sources must agree on."""
    examples = {"labelled": hard, "validation": held_out}
    shapes = {name: tuple(some.inputs.shape[1:]) for name, some in examples.items() if some is not None}
    if soft is not None:
        shapes["soft-labelled"] = tuple(soft.window([0])["inputs"].shape[1:])
    if len(set(shapes.values())) > 1:
        described = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"inputs of all examples must have one shape, got {described}")
    return next(iter(shapes.values()))
