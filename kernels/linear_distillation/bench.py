"""What a benchmark runs of `linear_distill_loss`; see `distillation/bench.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distilbeam.kernels.distillation.bench import Work, teacher_answers
from distilbeam.kernels.distillation.targets import Objective
from distilbeam.kernels.linear_distillation.interface import linear_distill_loss
from distilbeam.kernels.linear_distillation.precision import Precision
from distilbeam.kernels.linear_distillation.shapes import Shape


class LayerProblem:
    """A random last layer, and a teacher that is one too, of the same sizes."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        """Draw the tensors of a shape from a fixed seed."""
        rows, features, classes, kept = self.shape = shape
        generator = torch.Generator(device).manual_seed(0)
        scale = features**-0.5

        def random(size: int, factor: float) -> Tensor:
            return (factor * torch.randn(size, features, generator=generator, device=device)).to(dtype)

        self.leaves = [random(rows, 1.0).requires_grad_(), random(classes, scale).requires_grad_()]
        self.teacher = [random(rows, 1.0), random(classes, 3 * scale)]
        self.labels, self.dense, self.hard = teacher_answers(self.teacher[0] @ self.teacher[1].T, kept)
        # the layer read, its gradients written; three products of 2 B H C
        moved = 2 * self.leaves[0].element_size() * features * (rows + classes)
        self.work = Work(moved, 6 * rows * features * classes)


def step(
    problem: LayerProblem,
    implementation: str | None,
    precision: Precision | None = None,
    objective: Objective = "tail",
) -> Callable[[], Tensor]:
    """Give a function that computes the loss of an implementation, in its layer's own precision or in fewer bits."""
    hidden, weight = problem.leaves
    return lambda: linear_distill_loss(
        hidden, weight, None, problem.labels, objective=objective, precision=precision, implementation=implementation
    )
