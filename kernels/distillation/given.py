"""A label as a call gives it, for kernels that prepare it themselves instead of a dozen operations on a few numbers a row.

What is left to do before such a kernel is to look at shapes and, where that waits for nobody, at values. The arithmetic is that
of `targets.prepare`, row by row; SLaM's candidates, which are ranked, and a second term of true classes are not for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distilbeam.kernels.distillation.divergences import FORWARD, Divergence, divergence_of
from distilbeam.kernels.distillation.targets import BUCKETED, check_labels
from distilbeam.kernels.distillation.terms import Options, check_call, denominator, vector
from distilbeam.kernels.labels import DenseLabels, HardLabels, Labels, TopKLabels


@dataclass(frozen=True)
class Given:
    """What a kernel reads of a call besides the logits.

    Attributes:
      labels: the teacher's, or true classes.
      objective: see `distill_loss`; without a meaning for true classes.
      temperature: T, 1 for true classes.
      weight: factor of each row's loss, floating [B]; None for 1.
      mask: rows that count, bool [B]; None for all.
      normalizer: of one number, which divides the losses; None for 1.
      share: a number that multiplies them.
      divergence: that the objective is; forward for true classes.
    """

    labels: Labels
    objective: str
    temperature: float
    weight: Tensor | None
    mask: Tensor | None
    normalizer: Tensor | None
    share: float
    divergence: Divergence = FORWARD

    @property
    def entropy(self) -> bool:
        """Whether the target's own entropy is subtracted."""
        return self.objective != "ce" and not isinstance(self.labels, HardLabels)

    @property
    def rest_temperature(self) -> float:
        """The temperature at which the rest of a sparse label is brought together; see `targets.py`."""
        return 1.0 if self.objective in BUCKETED or isinstance(self.labels, HardLabels) else self.temperature

    def flags(self) -> dict[str, int]:
        """Give what the kernels of sparse labels are compiled for."""
        labels = self.labels
        hard = isinstance(labels, HardLabels)
        tail = (1 if labels.tail_logmass is not None else 2) if isinstance(labels, TopKLabels) else 0
        return {"TAIL": tail, "BUCKET": tail > 0 and self.objective in BUCKETED, "HARD": hard, **self.of_rows()}

    def of_rows(self) -> dict[str, int]:
        """Give which of the rows' numbers there are."""
        return {
            "MASKED": self.mask is not None,
            "WEIGHTED": self.weight is not None,
            "DIVIDED": self.normalizer is not None,
        }


def reasons(labels: Labels, options: Options) -> list[str]:
    """Say why a kernel cannot prepare the label of a call."""
    found = []
    if options.objective in ("slam", "renormalised") and not isinstance(labels, HardLabels):
        found.append(f"it prepares no label of objective {options.objective!r}")
    other = (
        not isinstance(labels, HardLabels) and divergence_of(options.objective, options.beta, options.alpha) != FORWARD
    )
    if other and isinstance(labels, DenseLabels):
        found.append(f"it prepares dense labels for forward KL, not for objective {options.objective!r}")
    if options.hard is not None:
        found.append("it takes no true classes beside the label")
    return found


@torch.no_grad()
def given(labels: Labels, num_rows: int, num_classes: int, options: Options) -> Given:
    """Check a call and take from it what a kernel reads.

    Args:
      labels: of the batch.
      num_rows: B.
      num_classes: C.
      options: the call's other arguments, without any of `reasons`.

    Returns:
      The label and what belongs to the rows.

    Raises:
      ValueError: sizes disagree or an argument is out of range.
    """
    check_call(labels, num_rows, num_classes, options)
    hard = isinstance(labels, HardLabels)
    if not isinstance(labels, HardLabels):
        check_labels(labels, num_classes, options.objective, options.accuracy)
    mask = None if options.mask is None else vector("mask", options.mask, num_rows).bool().contiguous()
    weight = None if options.weight is None else vector("weight", options.weight, num_rows).contiguous()
    share: Tensor | float = 1.0
    if options.reduction == "mean":
        counted = mask
        if isinstance(labels, HardLabels) and options.normalizer is None:
            known = labels.classes != labels.ignore_index
            counted = known if mask is None else mask & known
        share = denominator(options.normalizer, counted, num_rows, torch.float32)
    divided = share if isinstance(share, Tensor) else None
    return Given(
        _dense_rows(labels),
        options.objective,
        1.0 if hard else options.temperature,
        weight,
        mask,
        divided,
        1.0 if isinstance(share, Tensor) else 1 / share,
        FORWARD if hard else divergence_of(options.objective, options.beta, options.alpha),
    )


def _dense_rows(labels: Labels) -> Labels:
    """Bring a label's tensors to rows without gaps."""
    if isinstance(labels, HardLabels):
        return HardLabels(labels.classes.contiguous(), labels.ignore_index)
    if isinstance(labels, DenseLabels):
        return DenseLabels(labels.logprobs if labels.logprobs.stride(1) == 1 else labels.logprobs.contiguous())
    tail = {"tail_logmass": labels.tail_logmass} if isinstance(labels, TopKLabels) else {}
    if isinstance(labels, TopKLabels) and labels.tail_logmass is not None:
        tail = {"tail_logmass": labels.tail_logmass.contiguous()}
    return type(labels)(labels.logprobs.contiguous(), labels.classes.contiguous(), **tail)
