"""What a benchmark runs of `distill_loss`: a problem of a shape, a step of an implementation, the work it cannot avoid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from distilbeam.kernels.distillation.interface import distill_loss
from distilbeam.kernels.distillation.shapes import Shape
from distilbeam.kernels.distillation.targets import Objective
from distilbeam.kernels.labels import DenseLabels, TopKLabels

MOST_DENSE = {
    "cpu": 1 << 28,
    "cuda": 1 << 30,
}  # numbers of a teacher's full distribution that are held beside its label


class Work(NamedTuple):
    """Bytes moved and operations of matrix products, at least, forward and backward."""

    bytes: int
    operations: int


class Problem(Protocol):
    """What candidates are given.

    Attributes:
      leaves: the tensors whose gradients are wanted.
      labels: the teacher's top-k labels.
      dense: its full log-probabilities, float32 [B, C]; None where they would not fit.
      hard: its best classes, [B].
      work: what no implementation can avoid.
    """

    leaves: Sequence[Tensor]
    labels: TopKLabels
    dense: Tensor | None
    hard: Tensor
    work: Work


class LogitsProblem:
    """A student's random logits and a teacher's labels."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        """Draw the tensors of a shape from a fixed seed."""
        rows, classes, kept = self.shape = shape
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.randn(rows, classes, generator=generator, device=device).to(dtype).requires_grad_()
        teacher = 3 * torch.randn(rows, classes, generator=generator, device=device)
        self.leaves = [logits]
        self.labels, self.dense, self.hard = teacher_answers(teacher, kept)
        self.work = Work(2 * logits.element_size() * rows * classes, 0)  # logits read, gradients written


def teacher_answers(logits_BC: Tensor, kept: int) -> tuple[TopKLabels, Tensor | None, Tensor]:
    """Turn a teacher's logits into its label, its full distribution where that is small enough, and its best classes."""
    logprobs = logits_BC.float().log_softmax(1)
    top = logprobs.topk(kept, dim=1)
    tail = torch.log1p(-top.values.exp().sum(1).clamp(max=1 - 1e-6))
    dense = logprobs if logprobs.numel() <= MOST_DENSE[logprobs.device.type] else None
    return TopKLabels(top.values, top.indices, tail), dense, top.indices[:, 0].contiguous()


def step(
    problem: LogitsProblem, implementation: str | None, *, dense: bool = False, objective: Objective = "tail"
) -> Callable[[], Tensor]:
    """Give a function that computes the loss of an implementation: over buckets of the label, or KL to all classes."""
    (logits,) = problem.leaves
    if not dense:
        return lambda: distill_loss(logits, problem.labels, objective=objective, implementation=implementation)
    if problem.dense is None:
        raise NotImplementedError("the teacher's full distribution does not fit")
    labels = DenseLabels(problem.dense)
    return lambda: distill_loss(logits, labels, objective="kl", implementation=implementation)
