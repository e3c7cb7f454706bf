"""The loss of one training step, over its soft-labelled and its human-labelled rows together.

    (sum over soft-labelled rows of w_i l_i  +  hard_weight * sum over human-labelled rows of cross-entropy) / rows

with l_i the distillation loss, by forward KL or another divergence (`kernels/distillation/divergences.py`), a share of which
may be the cross-entropy to the teacher's likeliest class, or Student-Label Mixing's (arXiv:2302.03806), and w_i = 1 or the row's debiasing weight
(Weighted distillation, arXiv:2210.06711). With mixup (arXiv:1710.09412) it is share L(y) + (1 - share) L(y of the
partners), which for cross-entropy is the loss to the mixed labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distilbeam.kernels.distillation.interface import distill_loss
from distilbeam.kernels.labels import DenseLabels, HardLabels, Labels, SampledLabels, TopKLabels
from distilbeam.kernels.linear_distillation.interface import linear_distill_loss
from distilbeam.student.data.loader import Batch, teacher_labels
from distilbeam.student.training.augment import Mixture
from distilbeam.student.training.batches import StepRows
from distilbeam.student.training.config import DIVERGENCES, TrainConfig
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
      network: the student, or all of it but its last layer (`wrap.py`).
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
    with torch.autocast(device.type, torch.bfloat16, enabled=training.precision != "fp32"):
        answers = network(inputs.to(device, non_blocking=True))
    if idle:
        network.train()
        logits_BC = nn.functional.linear(*answers) if isinstance(answers, tuple) else answers
        nothing: Tensor = logits_BC.float().sum()  # 0, whose gradient is 0 for every weight
        return nothing
    step = _Step(training, rows, spec, weight, device, answers[1:] if isinstance(answers, tuple) else None)
    values = answers[0] if isinstance(answers, tuple) else answers
    if mixture is None:
        return step.loss(values, 1.0)
    shares = [pair for pair in mixture.losses(values) if pair[0] > 0]
    return torch.stack([step.loss(mixed, share) for share, mixed in shares]).sum()


@dataclass(frozen=True)
class _Step:
    """What a step's loss is made of.

    Attributes:
      training: the training's configuration.
      rows: what the step is about.
      spec: of the soft labels, or None.
      weight: of each soft-labelled row, or None.
      device: where the student is.
      layer: weight and bias of the last layer, when what is compared are its inputs instead of logits.
    """

    training: TrainConfig
    rows: StepRows
    spec: SoftLabelSpec | None
    weight: Tensor | None
    device: torch.device
    layer: tuple[Tensor, Tensor | None] | None

    def loss(self, values: Tensor, share: float) -> Tensor:
        """Compute `share` of the loss of logits [B, C], or of the last layer's inputs [B, H]."""
        count = 0 if self.rows.soft is None else len(self.rows.soft["inputs"])
        # gradients are averaged over the processes, and those of a mean are made finished
        normalizer = self.rows.count / self.rows.processes / share
        parts: list[Tensor] = []
        if self.rows.soft is not None and self.spec is not None and count:
            batch = _moved(self.rows.soft, self.device)
            parts.append(self._soft(values[:count], batch, self.spec, normalizer))
        if self.rows.hard is not None and len(self.rows.hard):
            classes = self.rows.hard.classes.to(self.device, non_blocking=True)
            parts.append(self._hard(values[count:], classes, normalizer))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _soft(self, values: Tensor, batch: Batch, spec: SoftLabelSpec, normalizer: float) -> Tensor:
        training, labels = self.training, teacher_labels(batch, spec)
        mixed = training.objective.startswith("slam")
        plain = {"dense": "kl", "top_k": "tail", "sampled": "sampled"}[spec.kind]
        own = training.objective if training.objective in DIVERGENCES else plain
        options: dict[str, Any] = {
            "accuracy": batch["alpha"] if mixed else None,
            "candidates": batch["candidates"] if mixed else None,
            "temperature": training.temperature,
            "objective": "slam" if mixed else own,
            "mixing": training.mixing,
            "normalizer": normalizer,
        }
        options |= {name: x for name in ("beta", "alpha") if (x := getattr(training, name)) is not None}
        if training.hard_share:
            options |= {"hard": likeliest_classes(labels), "hard_share": training.hard_share}
        weight = None if self.weight is None else self.weight.to(values.device)
        return self._distill(values, labels, weight, options)

    def _hard(self, values: Tensor, classes: Tensor, normalizer: float) -> Tensor:
        factor = self.training.hard_weight / normalizer
        if self.layer is not None:
            ones = torch.full((len(values),), self.training.hard_weight, device=values.device)
            return self._distill(values, HardLabels(classes), ones, {"normalizer": normalizer})
        smoothing = self.training.augment.label_smoothing
        return factor * nn.functional.cross_entropy(values.float(), classes, reduction="sum", label_smoothing=smoothing)

    def _distill(self, values: Tensor, labels: Labels, weight: Tensor | None, options: dict[str, Any]) -> Tensor:
        if self.layer is None:
            return distill_loss(values, labels, weight=weight, **options)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision != "fp32"):
            return linear_distill_loss(values, *self.layer, labels, example_weight=weight, **options)


def likeliest_classes(labels: DenseLabels | TopKLabels | SampledLabels) -> Tensor:
    """Give the teacher's likeliest class of each row, the first of several, int64 [B]; -100 for a row without a class."""
    if isinstance(labels, DenseLabels):
        return labels.logprobs.argmax(dim=1)
    kept = labels.logprobs.masked_fill(labels.classes < 0, -torch.inf).argmax(dim=1, keepdim=True)
    classes = labels.classes.long().gather(1, kept)[:, 0]
    return classes.masked_fill(classes < 0, -100)


def _moved(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    return {name: value.to(device, non_blocking=True) for name, value in batch.items() if name != "inputs"}
