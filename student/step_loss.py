"""The loss of one training step, over its soft-labelled and its human-labelled rows together.

    (sum over soft-labelled rows of w_i l_i  +  hard_weight * sum over human-labelled rows of cross-entropy) / rows

with l_i the distillation loss, or Student-Label Mixing's (arXiv:2302.03806), and w_i = 1 or the row's debiasing weight
(Weighted distillation, arXiv:2210.06711). With mixup (arXiv:1710.09412) it is share L(y) + (1 - share) L(y of the
partners), which for cross-entropy is the loss to the mixed labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distilbeam.kernels.distillation.interface import distill_loss
from distilbeam.student.augment import Mixture
from distilbeam.student.data import Batch, teacher_labels
from distilbeam.student.labelled import Examples
from distilbeam.student.sources import StepRows
from distilbeam.student.train_config import TrainConfig
from distilbeam.teacher.softlabels import SoftLabelSpec


def step_loss(
    network: nn.Module,
    training: TrainConfig,
    rows: StepRows,
    spec: SoftLabelSpec | None,
    weight: Tensor | None,
    mixture: Mixture | None,
    device: torch.device,
) -> Tensor:
    """Compute the loss of a step.

    Args:
      network: the student.
      training: its training's configuration.
      rows: what the step is about.
      spec: of the soft labels, given together with them.
      weight: of each soft-labelled row, float32 [soft rows]; None for 1.
      mixture: how the rows are mixed, or None.
      device: where the student is.

    Returns:
      A scalar, float32: this process's part of the step's loss, such that the mean over the processes is the whole.
    """
    inputs = rows.inputs() if mixture is None else mixture.inputs(rows.inputs())
    idle = not len(inputs)  # a process without a row of the last step takes part, but has nothing for batch norms
    if idle:
        network.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
        logits_BC = network(inputs.to(device, non_blocking=True))
    if idle:
        network.train()
        nothing: Tensor = logits_BC.float().sum()  # 0, whose gradient is 0 for every weight
        return nothing
    if mixture is None:
        total = _sum(logits_BC, training, rows, spec, weight, device)
    else:
        own, partners = mixture.losses(logits_BC)
        total = own[0] * _sum(own[1], training, rows, spec, weight, device)
        total = total + partners[0] * _sum(partners[1], training, rows, spec, weight, device)
    return total / rows.count if rows.processes == 1 else total * (rows.processes / rows.count)


def _sum(
    logits_BC: Tensor,
    training: TrainConfig,
    rows: StepRows,
    spec: SoftLabelSpec | None,
    weight: Tensor | None,
    device: torch.device,
) -> Tensor:
    count = 0 if rows.soft is None else len(rows.soft["inputs"])
    parts: list[Tensor] = []
    if rows.soft is not None and spec is not None and count:
        parts.append(_soft_loss(logits_BC[:count], training, _moved(rows.soft, device), spec, weight))
    if rows.hard is not None and len(rows.hard):
        parts.append(training.hard_weight * _hard_loss(logits_BC[count:], training, rows.hard, device))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _soft_loss(
    logits_BC: Tensor, training: TrainConfig, batch: Batch, spec: SoftLabelSpec, weight: Tensor | None
) -> Tensor:
    mixed = training.objective.startswith("slam")
    plain = {"dense": "kl", "top_k": "tail", "sampled": "sampled"}[spec.kind]
    return distill_loss(
        logits_BC,
        teacher_labels(batch, spec),
        weight=None if weight is None else weight.to(logits_BC.device),
        accuracy=batch["alpha"] if mixed else None,
        candidates=batch["candidates"] if mixed else None,
        temperature=training.temperature,
        objective="slam" if mixed else plain,  # type: ignore[arg-type]
        mixing=training.mixing,
        reduction="sum",
    )


def _hard_loss(logits_BC: Tensor, training: TrainConfig, hard: Examples, device: torch.device) -> Tensor:
    return nn.functional.cross_entropy(
        logits_BC.float(),
        hard.classes.to(device, non_blocking=True),
        reduction="sum",
        label_smoothing=training.augment.label_smoothing,
    )


def _moved(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return {name: value.to(device, non_blocking=True) for name, value in batch.items() if name != "inputs"}
