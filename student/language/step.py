"""The loss of a micro-batch of blocks, all of it inside one module's forward pass.

    sum over labelled positions of (1 - hard_share) l(student, teacher) + hard_share (-log q of the text's own token)  /  normalizer

with l the distillation loss of `kernels/distillation`. DistributedDataParallel and FSDP put their work around a module's forward pass,
so that whatever reads a weight must be in it, the last layer with its loss too. Hidden states of labelled positions alone reach
the last layer, which is never multiplied out to logits of all positions.

The normalizer is the number of labelled positions of the step in all processes and micro-batches, over the number of processes,
which average their gradients: a mean of means would weigh a token by how few others stand in its micro-batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distilbeam.kernels.labels import HardLabels, Labels, SampledLabels, TopKLabels
from distilbeam.kernels.linear_distillation.interface import linear_distill_loss
from distilbeam.student.language.config import TokenTrainConfig, objective_of
from distilbeam.student.language.network import CausalLm
from distilbeam.teacher.softlabels import SoftLabelSpec

Batch = Mapping[str, Tensor]
LABELLED = ("teacher_classes", "teacher_logprobs", "teacher_tail_logmass")


@dataclass(frozen=True)
class Positions:
    """The labelled positions of some blocks.

    Attributes:
      places: int64 [N], their numbers in the blocks' positions one after another.
      tokens: int64 [N], the token that stands behind each.
      rows: bool [b, P], where their labels stand.
    """

    places: Tensor
    tokens: Tensor
    rows: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Positions:
        """Find the labelled positions of a batch of `TokenLabelDataset`: label j describes token j + 1."""
        there_bP = batch["teacher_classes"][..., 0] >= 0
        blocks_bP, labels_bP = torch.nonzero(there_bP, as_tuple=True)
        at = batch["label_positions"].long()[blocks_bP, labels_bP] if "label_positions" in batch else labels_bP
        ids_bL = batch["input_ids"]
        return cls(blocks_bP * ids_bL.shape[1] + at, ids_bL[blocks_bP, at + 1].long(), there_bP)


def labels_of(batch: Batch, spec: SoftLabelSpec, positions: Positions) -> Labels:
    """Make what the losses take of the labels of labelled positions."""
    found = {name: batch[name][positions.rows] for name in LABELLED if name in batch}
    if spec.kind == "top_k":
        return TopKLabels(found["teacher_logprobs"], found["teacher_classes"], found["teacher_tail_logmass"])
    return SampledLabels(found["teacher_logprobs"], found["teacher_classes"])


def objective(training: TokenTrainConfig, spec: SoftLabelSpec) -> str:
    """The objective of a training on labels of a specification.

    Raises:
      ValueError: draws cannot be learned by it without bias.
    """
    return objective_of(training, spec.kind)


class TokenStep(nn.Module):
    """A student together with its loss.

    Args:
      network: the student.
      training: its training's configuration.
      spec: of the labels.

    Raises:
      ValueError: see `objective`.
    """

    def __init__(self, network: CausalLm, training: TokenTrainConfig, spec: SoftLabelSpec) -> None:
        super().__init__()
        self.network = network
        self._spec, self._hard_share = spec, training.hard_share
        self._narrow = training.precision == "bf16"
        self._options: dict[str, Any] = {"objective": objective(training, spec), "temperature": training.temperature}
        self._options |= {n: v for n in ("beta", "alpha") if (v := getattr(training, n)) is not None}

    def forward(self, batch: Batch, normalizer: float) -> Tensor:
        """Compute the loss of blocks, a scalar; without a labelled position a 0 that has every weight's gradient, 0 too."""
        device = batch["input_ids"].device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._narrow):
            hidden_bLH = self.network.hidden(batch["input_ids"], batch["segment_ids"])
            head: Any = self.network.head
            positions = Positions.of(batch)
            if not len(positions.places):
                nothing: Tensor = hidden_bLH.float().sum() * 0 + sum(p.float().sum() * 0 for p in head.parameters())
                return nothing
            hidden_NH = hidden_bLH.flatten(0, 1)[positions.places]
            classes = self._spec.num_classes  # a head may have more rows, which no label knows
            bias = getattr(head, "bias", None)
            weight, bias = head.weight[:classes], None if bias is None else bias[:classes]
            if self._hard_share == 1:
                return linear_distill_loss(hidden_NH, weight, bias, HardLabels(positions.tokens), normalizer=normalizer)
            mixed: dict[str, Any] = (
                {"hard": positions.tokens, "hard_share": self._hard_share} if self._hard_share else {}
            )
            labels = labels_of(batch, self._spec, positions)
            return linear_distill_loss(hidden_NH, weight, bias, labels, normalizer=normalizer, **mixed, **self._options)


def micro_batches(batch: Batch, parts: int, device: torch.device) -> list[Batch]:
    """Cut a process's blocks of a step into equally many micro-batches in every process.

    Args:
      batch: of `TokenLabelDataset`; perhaps of no block.
      parts: how many.
      device: where they go.

    Returns:
      The parts; one without a block of its own gets a block of padding, for its forward pass is one that others wait for.
    """
    names = [name for name in ("input_ids", "segment_ids", "label_positions", *LABELLED) if name in batch]
    blocks = len(batch["input_ids"])
    ends = [blocks * part // parts for part in range(parts + 1)]
    made: list[Batch] = []
    for start, end in itertools.pairwise(ends):
        if end > start:
            made.append({name: batch[name][start:end].to(device, non_blocking=True) for name in names})
        else:
            empty = {name: batch[name].new_zeros(1, *batch[name].shape[1:]) for name in names}
            empty["teacher_classes"] = empty["teacher_classes"] - 1
            made.append({name: value.to(device) for name, value in empty.items()})
    return made
