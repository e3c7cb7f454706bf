"""Train a student whose images stay on the accelerator: bfloat16, flips and shifts, batches drawn there.

What is learned in a step is the product's `step_loss`, with its optimizer and schedule; what differs from `training.fit` is where
batches are made. An epoch of 50,000 images of 32 x 32 pixels takes longer to copy than to learn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.science.problems import Problem
from distilbeam.student.data.labelled import Examples
from distilbeam.student.data.loader import Batch
from distilbeam.student.networks.build import build_student
from distilbeam.student.training.batches import StepRows
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.loss import step_loss
from distilbeam.student.training.optimizer import make_optimizer, set_lr
from distilbeam.student.training.rng import own_generators
from distilbeam.teacher.softlabels import SoftLabelSpec

SHIFT = 4  # pixels


class InBfloat16(nn.Module):
    """A network whose products are in bfloat16; its logits are float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [B, C]."""
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.module(x)
        return logits.float()


def changed(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror every other image and shift each by up to `SHIFT` pixels, the border mirrored."""
    batch, _, height, width = images_BCHW.shape
    device = images_BCHW.device
    mirrored = torch.rand(batch, device=device, generator=generator) < 0.5
    images_BCHW = torch.where(mirrored[:, None, None, None], images_BCHW.flip(-1), images_BCHW)
    padded = nn.functional.pad(images_BCHW, (SHIFT,) * 4, mode="reflect")
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, batch), device=device, generator=generator)
    y_BH = down[:, None] + torch.arange(height, device=device)
    x_BW = right[:, None] + torch.arange(width, device=device)
    example_B11 = torch.arange(batch, device=device)[:, None, None]
    return padded[example_B11, :, y_BH[:, :, None], x_BW[:, None, :]].permute(0, 3, 1, 2)


def fit_on_device(
    problem: Problem, soft: Batch | None, weight: Tensor | None, hard: Examples | None, training: TrainConfig
) -> nn.Module:
    """Train a student from random weights for `problem.steps` steps.

    Args:
      problem: with inputs on the accelerator.
      soft: soft-labelled rows, their columns.
      weight: theirs, or None for 1.
      hard: human-labelled rows.
      training: how; its epochs are replaced by the problem's steps.
    """
    device = problem.inputs.device
    spec = SoftLabelSpec(num_classes=problem.classes)
    soft = None if soft is None else {name: column.to(device) for name, column in soft.items()}
    weight = None if weight is None else weight.to(device)
    hard = None if hard is None else Examples(hard.inputs.to(device), hard.classes.to(device))
    sizes = [0 if soft is None else len(soft["inputs"]), 0 if hard is None else len(hard)]
    rows = min(training.batch_size, sum(sizes))
    soft_rows = round(rows * sizes[0] / sum(sizes))
    with own_generators(problem.seed, device):
        module = build_student(problem.student, tuple(problem.inputs.shape[1:]), problem.classes).to(device)
        network, generator = InBfloat16(module), torch.Generator(device).manual_seed(problem.seed)
        optimizer, parameters = make_optimizer(module, training), list(module.parameters())
        module.train()
        for done in range(problem.steps):
            batch, human, weights = None, None, None
            if soft is not None and soft_rows:
                drawn = torch.randint(0, sizes[0], (soft_rows,), device=device, generator=generator)
                batch = {name: column[drawn] for name, column in soft.items()}
                batch["inputs"] = changed(batch["inputs"], generator)
                weights = None if weight is None else weight[drawn]
            if hard is not None and rows - soft_rows:
                drawn = torch.randint(0, sizes[1], (rows - soft_rows,), device=device, generator=generator)
                human = Examples(changed(hard.inputs[drawn], generator), hard.classes[drawn])
            set_lr(optimizer, training, done, problem.steps)
            loss = step_loss(network, training, StepRows(batch, human, rows, 1), spec, weights, None, device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if training.clip is not None:
                nn.utils.clip_grad_norm_(parameters, training.clip)
            optimizer.step()
    return module
