"""Label quality: how far to trust a label by what the validation set says about the teacher; carried to workers as text.

`alpha` and `candidates` are Student-Label Mixing's estimates of the teacher's accuracy and of the number of classes that
hold the truth (arXiv 2302.03806); `weight` is Weighted Distillation's debiasing weight (arXiv 2210.06711), which depends
on the student as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.selection.trust.debias import DebiasEstimator
from distilbeam.selection.trust.noise import TeacherNoise


@dataclass(frozen=True)
class Estimates:
    """Fitted estimates.

    Attributes:
      noise: the teacher's accuracy and candidate classes as functions of its margin.
      debias: nearest neighbours in confidence space.
    """

    noise: TeacherNoise
    debias: DebiasEstimator

    @classmethod
    def fit(
        cls,
        teacher_logprobs: npt.NDArray[np.float32],
        student_logits: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int64],
        floor: float,
        coverage: float,
    ) -> Estimates:
        """Fit on the validation set.

        Args:
          teacher_logprobs: float [n, classes].
          student_logits: float [n, classes].
          labels: int [n], the true classes.
          floor: lower bound of `alpha`, in [0, 1].
          coverage: how often the truth must be among the candidates, in (0, 1).
        """
        noise = TeacherNoise.fit(teacher_logprobs, labels, floor=floor, coverage=coverage)
        # soft: a student learns from the teacher's probabilities, not from its most probable class
        return cls(noise, DebiasEstimator.fit(student_logits, teacher_logprobs, labels, soft=True))

    def columns(
        self, teacher_logprobs: npt.NDArray[np.float32], student_logits: npt.NDArray[np.float32]
    ) -> dict[str, pa.Array]:
        """Return the columns `alpha` (float32), `candidates` (int32) and `weight` (float32) of n examples."""
        return {
            "alpha": pa.array(self.noise.accuracy(teacher_logprobs).astype(np.float32)),
            "candidates": pa.array(self.noise.candidates(teacher_logprobs).astype(np.int32)),
            "weight": pa.array(self.debias.weights(student_logits, teacher_logprobs).astype(np.float32)),
        }

    def to_text(self) -> str:
        """Return the estimates as JSON text."""
        return json.dumps({"noise": self.noise.to_json(), "debias": self.debias.to_json()})

    @classmethod
    def from_text(cls, text: str) -> Estimates:
        """Rebuild estimates from `to_text`'s text."""
        data = json.loads(text)
        return cls(TeacherNoise.from_json(data["noise"]), DebiasEstimator.from_json(data["debias"]))
