"""A teacher: a network of the product's trained on few human labels, and its answers about every row."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from benchmarks.science.problems import Floats, Indices, Problem
from benchmarks.science.training import fit, logits_of
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig

NONE = np.zeros(0, np.int64)


def teacher_answers(
    network: StudentConfig,
    training: TrainConfig,
    steps: int,
    inputs: Tensor,
    truth: Indices,
    labelled: Indices,
    classes: int,
    seed: int,
) -> Floats:
    """Train a teacher and ask it.

    Args:
      network: the teacher's.
      training: how it is trained.
      steps: for how long.
      inputs: of all rows, as the teacher sees them.
      truth: their classes.
      labelled: rows that it is trained on.
      classes: how many there are.
      seed: of its weights and order.

    Returns:
      Its logits of all rows, float32 [n, C].
    """
    nothing = np.zeros((0, classes), np.float32)
    lesson = Problem(network, training, steps, inputs, truth, nothing, labelled, NONE, NONE, NONE, seed)
    teacher = fit(lesson, None, lesson.human(labelled))
    return logits_of(teacher, lesson, np.arange(len(truth)))
