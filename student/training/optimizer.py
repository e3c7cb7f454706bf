"""The optimizer of a training, its learning rate from step to step, and the moving average of its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from distilbeam.student.networks.laurel import without_decay
from distilbeam.student.training.config import LoopConfig


def make_optimizer(module: nn.Module, training: LoopConfig) -> torch.optim.Optimizer:
    """Make the optimizer; biases, norms and learned residuals have no weight decay.

    Args:
      module: the student, on its device.
      training: its training's configuration.
    """
    exempt = without_decay(module)
    groups = [
        {"params": [p for p in module.parameters() if p not in exempt], "weight_decay": training.weight_decay},
        {"params": [p for p in module.parameters() if p in exempt], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=0.9, nesterov=True)
    fused = next(module.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=training.lr, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, training: LoopConfig, done: int, total: int) -> float:
    """Set the learning rate of the next step: a linear rise, then a half cosine or a constant.

    Args:
      optimizer: the training's.
      training: its configuration.
      done: steps done.
      total: steps in all.

    Returns:
      The learning rate.
    """
    lr = training.lr * _factor(done, total, training)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def moving_average(module: nn.Module, decay: float | None) -> AveragedModel | None:
    """Make the exponential moving average of a student's weights and statistics; None without a decay.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the initial weights are soon forgotten.

    Args:
      module: the student.
      decay: the largest decay.
    """
    if decay is None:
        return None

    @torch.no_grad()
    def update(averages: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
        if not averages[0].is_floating_point():  # a count of batches has no average
            torch._foreach_copy_(list(averages), list(current))
            return
        share = 1 - min(decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(list(averages), list(current), share)

    average = AveragedModel(module, multi_avg_fn=update, use_buffers=True)
    average.update_parameters(module)
    return average


def _factor(done: int, total: int, training: LoopConfig) -> float:
    warm = math.ceil(training.warmup * total)
    if done < warm:
        return (done + 1) / warm
    if training.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - warm) / max(1, total - warm)))
