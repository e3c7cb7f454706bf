"""The loss of one training step, over its soft-labelled and its human-labelled rows together.

    (sum over soft-labelled rows of w_i l_i  +  hard_weight * sum over human-labelled rows of cross-entropy) / rows

with l_i the distillation loss, or Student-Label Mixing's (arXiv:2302.03806), and w_i = 1 or the column `weight`
(Weighted distillation, arXiv:2210.06711) divided by its mean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distilbeam.kernels.distillation.interface import distill_loss
from distilbeam.student.data import Batch, teacher_labels
from distilbeam.student.labelled import Examples
from distilbeam.student.train_config import TrainConfig
from distilbeam.teacher.softlabels import SoftLabelSpec


def step_loss(
    module: nn.Module,
    training: TrainConfig,
    soft: Batch | None,
    hard: Examples | None,
    spec: SoftLabelSpec | None,
    weight_scale: float,
    device: torch.device,
) -> Tensor:
    """Compute the loss of a step.

    Args:
      module: the student.
      training: its training's configuration.
      soft: soft-labelled rows with their `inputs`, or None.
      hard: human-labelled rows, or None.
      spec: of the soft labels, given together with them.
      weight_scale: factor that brings the column `weight` to mean 1.
      device: where the student is.

    Returns:
      A scalar, float32.
    """
    inputs = ([] if soft is None else [soft["inputs"]]) + ([] if hard is None else [hard.inputs])
    with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
        logits_BC = module(torch.cat(inputs).to(device))
    count = 0 if soft is None else len(soft["inputs"])
    total: Tensor = logits_BC.new_zeros((), dtype=torch.float32)
    if soft is not None and spec is not None and count:
        total = total + _soft_loss(logits_BC[:count], training, _moved(soft, device), spec, weight_scale)
    if hard is not None and len(hard):
        truth = hard.classes.to(device)
        cross_entropy = nn.functional.cross_entropy(logits_BC[count:].float(), truth, reduction="sum")
        total = total + training.hard_weight * cross_entropy
    return total / max(1, len(logits_BC))


def _soft_loss(
    logits_BC: Tensor, training: TrainConfig, batch: Batch, spec: SoftLabelSpec, weight_scale: float
) -> Tensor:
    mixed = training.objective.startswith("slam")
    plain = {"dense": "kl", "top_k": "tail", "sampled": "sampled"}[spec.kind]
    return distill_loss(
        logits_BC,
        teacher_labels(batch, spec),
        weight=batch["weight"] * weight_scale if "weighted" in training.objective else None,
        accuracy=batch["alpha"] if mixed else None,
        candidates=batch["candidates"] if mixed else None,
        temperature=training.temperature,
        objective="slam" if mixed else plain,  # type: ignore[arg-type]
        mixing=training.mixing,
        reduction="sum",
    )


def _moved(batch: Batch, device: torch.device) -> Batch:
    return batch if device.type == "cpu" else {name: value.to(device) for name, value in batch.items()}
