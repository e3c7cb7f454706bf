"""A problem: one seed of one dataset with one teacher, everything in memory.

The rows of a dataset are split by the seed into

    labelled      human labels that the student is trained on from the start
    validation    human labels for estimates alone: temperature, the teacher's errors, weights
    pool          no labels; the teacher can be asked about them, which costs one unit of the budget each
    test          looked at once a student is finished

and the teacher is trained on other rows than these. The truth of the pool is known to the measurement and to nobody else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel
from scipy.special import log_softmax
from torch import Tensor

from distilbeam.selection.trust.calibration import Calibration, fit_temperature
from distilbeam.student.data.labelled import Examples
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import LAST, TrainConfig

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Problem:
    """One seed of one dataset with one teacher.

    Attributes:
      student: the student's network.
      training: how it is trained; `epochs` is replaced by what `steps` amounts to.
      steps: optimizer steps of one training, whatever the number of rows: students of all methods get the same.
      inputs: of all rows, [n, ...].
      truth: int64 [n].
      teacher_logits: float32 [n, C], uncalibrated.
      labelled, validation, pool, test: rows.
      seed: of the split, the teacher and the students.
      lesson: rows that the teacher was trained on; None where it was not trained.
      vectors: of a sentence encoder for all rows, float32 [n, m]; None where there is none.
    """

    student: StudentConfig
    training: TrainConfig
    steps: int
    inputs: Tensor
    truth: Indices
    teacher_logits: Floats
    labelled: Indices
    validation: Indices
    pool: Indices
    test: Indices
    seed: int
    lesson: Indices | None = None
    vectors: Floats | None = None

    @property
    def classes(self) -> int:
        """C, the number of classes."""
        return self.teacher_logits.shape[1]

    @cached_property
    def calibration(self) -> Calibration:
        """The temperature that suits the validation labels."""
        return fit_temperature(self.teacher_logits[self.validation], self.truth[self.validation])

    @cached_property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether the teacher's first class is true, of all rows."""
        return np.asarray(self.teacher_logits.argmax(axis=1) == self.truth)

    @property
    def teacher_accuracy(self) -> float:
        """The teacher's accuracy on the test rows."""
        return float(self.right[self.test].mean())

    def teacher_logprobs(self, kind: str = "calibrated") -> Floats:
        """Give the teacher's labels of all rows, log-probabilities [n, C]: `soft` as it says, `calibrated` or `hard`."""
        if kind == "hard":
            return self._hard
        return self._calibrated if kind == "calibrated" else self._soft

    def human(self, rows: Indices) -> Examples:
        """Give rows with their true classes."""
        index = torch.from_numpy(rows)
        return Examples(self.inputs[index], torch.from_numpy(self.truth[rows]))

    def rng(self, *names: int) -> np.random.Generator:
        """Make a generator of this problem's own."""
        return np.random.default_rng([self.seed, *names])

    @cached_property
    def _soft(self) -> Floats:
        return np.asarray(log_softmax(self.teacher_logits, axis=1), np.float32)

    @cached_property
    def _calibrated(self) -> Floats:
        return np.asarray(log_softmax(self.teacher_logits / self.calibration.temperature, axis=1), np.float32)

    @cached_property
    def _hard(self) -> Floats:
        logprobs = np.full(self.teacher_logits.shape, -np.inf, np.float32)
        logprobs[np.arange(len(logprobs)), self.teacher_logits.argmax(axis=1)] = 0.0
        return logprobs


@dataclass(frozen=True)
class Dataset:
    """How problems of a dataset are made.

    Attributes:
      name: of the dataset.
      teachers: settings of the teachers by their names.
      make: from a teacher's settings and a seed to a problem.
      recipe: counted up whenever `make` comes to mean something else, which makes old cells invalid.
      about: sizes, networks and trainings, plain data.
    """

    name: str
    teachers: dict[str, dict[str, Any]]
    make: Callable[[dict[str, Any], int], Problem]
    recipe: int
    about: dict[str, Any]


def about(sizes: dict[str, int], steps: int, **configs: BaseModel) -> dict[str, Any]:
    """Describe what a dataset's problems are made with, as plain data."""
    return {
        "sizes": sizes,
        "steps": steps,
        **{name: _plain(config) for name, config in configs.items()},
    }


def _plain(config: BaseModel) -> dict[str, Any]:
    """Dump a configuration without what no cell depends on, so that cells of before a setting was added stay what they are."""
    found: dict[str, Any] = config.model_dump(mode="json", exclude={*LAST, "track"})
    augment = found.get("augment", {})
    if not augment.get("word_dropout", True):
        del augment["word_dropout"]
    if found.get("init") == "random":
        del found["init"], found["encoder"]
    return found


def split(rows: Indices, sizes: dict[str, int], rng: np.random.Generator) -> dict[str, Indices]:
    """Split rows by chance into parts of the given sizes."""
    if sum(sizes.values()) > len(rows):
        raise ValueError(f"parts must be of at most the {len(rows):,} rows there are, got {sizes}")
    shuffled = rng.permutation(rows)
    ends = np.cumsum(list(sizes.values()))
    return dict(zip(sizes, (np.sort(part) for part in np.split(shuffled, ends)[:-1]), strict=True))
