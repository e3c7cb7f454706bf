"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels: the smallest real data, for many seeds."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.science.problems import Dataset, Indices, Problem, about, split
from benchmarks.science.teachers import teacher_answers
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig

TEACHERS = {f"{count} labels": {"labels": count} for count in (10, 20, 50, 150)}
SIZES = {"lesson": 150, "labelled": 20, "validation": 150, "pool": 900, "test": 577}
PIXELS = {"columns": ["pixels"], "shape": (64,)}
STUDENT = StudentConfig(kind="mlp", hidden=(32,), input=PIXELS)
TRAINING = TrainConfig(batch_size=64, lr=1e-2)
STEPS = 150
TEACHER = StudentConfig(kind="mlp", hidden=(128, 128), input=PIXELS)
ABOUT = about(SIZES, STEPS, student=STUDENT, training=TRAINING, teacher=TEACHER)


def digits() -> Dataset:
    """Describe the digits."""
    return Dataset("digits", TEACHERS, _make, 1, ABOUT)


@cache
def read() -> tuple[Tensor, Indices]:
    """Read pixels between 0 and 1, [n, 64], and classes."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    return torch.from_numpy((raw.data / 16).astype(np.float32)), raw.target.astype(np.int64)


def _make(teacher: dict[str, Any], seed: int) -> Problem:
    inputs, truth = read()
    rng = np.random.default_rng([seed, 64])
    parts = split(np.arange(len(truth)), SIZES, rng)
    lesson = np.sort(rng.permutation(parts.pop("lesson"))[: teacher["labels"]])
    logits = teacher_answers(TEACHER, TRAINING, STEPS, inputs, truth, lesson, 10, seed)
    return Problem(STUDENT, TRAINING, STEPS, inputs, truth, logits, **parts, seed=seed, lesson=lesson)
