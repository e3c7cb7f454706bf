"""A step of the trainer's own: the loss of random rows with sparse labels, forward and backward, without the optimizer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.batches import StepRows
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.distributed import Processes
from distilbeam.student.training.loss import step_loss
from distilbeam.student.training.wrap import UpToLastLayer, make_network, precisions
from distilbeam.teacher.softlabels import SoftLabelSpec
from measuring.steps import Step

KEPT = 10  # classes of a row that its label keeps


class StudentStep(NamedTuple):
    """What is timed, and what of it the training reports.

    Attributes:
      take: the step.
      together: whether the last layer and the loss are one operation.
      ran: what runs in which precision, in a line.
    """

    take: Step
    together: bool
    ran: str


def student_step(
    student: dict[str, Any], inputs: torch.Tensor, classes: int, training: TrainConfig, device: torch.device
) -> StudentStep:
    """Build a student and its step.

    Args:
      student: its configuration but for the input, which is what `inputs` are.
      inputs: of the rows, [B, ...]; integers are token ids of at most `classes`.
      classes: outputs of the last layer.
      training: the training's configuration.
      device: where the student is.
    """
    torch.manual_seed(0)
    tokens = {"kind": "tokens", "columns": ["x"], "max_length": inputs.shape[-1], "vocabulary": 1 + int(inputs.max())}
    given: dict[str, Any] = {"columns": ["x"]} if inputs.is_floating_point() else tokens
    config = StudentConfig.model_validate({**student, "input": given})
    module: nn.Module = build_student(config, tuple(inputs.shape[1:]), classes).to(device)
    count = len(inputs)
    spec = SoftLabelSpec(classes, kind="top_k", k=KEPT, teacher="benchmark")
    network = make_network(module, config, training, Processes(device), spec)
    logprobs = torch.randn(count, KEPT).log_softmax(1) - 0.1
    batch = {"inputs": inputs, "teacher_logprobs": logprobs}
    batch["teacher_classes"] = torch.rand(count, classes).topk(KEPT, dim=1).indices
    batch["teacher_tail_logmass"] = torch.log1p(-logprobs.exp().sum(1))
    rows, leaves = StepRows(batch, None, count, 1), list(module.parameters())

    def take() -> None:
        torch.autograd.grad(step_loss(network, training, rows, spec, None, None, device), leaves, allow_unused=True)

    together = isinstance(network, UpToLastLayer)
    return StudentStep(take, together, precisions(module, training, together=together))


def peaks_alone(script: str, arguments: Sequence[str]) -> list[int]:
    """Run a script whose last line are peaks in bytes, in a process that returns freed memory at once."""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [int(peak) for peak in done.stdout.splitlines()[-1].split()]
