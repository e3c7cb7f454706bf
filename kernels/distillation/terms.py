"""From the arguments of a call to the weighted sum of losses that a backend computes.

    loss_i = sum over terms of scale_i * l_term(i)

There is one term for the labels and, where true classes are mixed in, one for those. The scale carries the example's
weight, the share of the term and, unless the losses are wanted row by row, the mean's denominator, so that a backend
which computes gradients in its forward pass computes them finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distilbeam.kernels.distillation.ranges import check_values
from distilbeam.kernels.distillation.targets import (
    ALPHA,
    BETA,
    LEAST_TEMPERATURE,
    MIXINGS,
    MOST_TEMPERATURE,
    OBJECTIVES,
    Mixing,
    Objective,
    Targets,
    prepare,
)
from distilbeam.kernels.labels import DenseLabels, HardLabels, Labels

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")


@dataclass(frozen=True)
class Options:
    """The arguments that `distill_loss` and `linear_distill_loss` share; their docstrings explain them."""

    weight: Tensor | None = None
    accuracy: Tensor | float | None = None
    candidates: Tensor | int | None = None
    temperature: float = 1.0
    objective: Objective = "kl"
    mixing: Mixing = "normalised"
    hard: Tensor | None = None
    hard_share: float = 0.5
    mask: Tensor | None = None
    ignore_index: int = -100
    reduction: Reduction = "mean"
    normalizer: Tensor | float | None = None
    beta: float = BETA
    alpha: float = ALPHA

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("objective", self.objective, OBJECTIVES),
            ("mixing", self.mixing, MIXINGS),
            ("reduction", self.reduction, REDUCTIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"hard_share must be between 0 and 1, got {self.hard_share}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be between 0 (forward KL) and 1 (reverse KL), got {self.beta}")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha must be at least 0 and below 1, where nothing is compared, got {self.alpha}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE:
            raise ValueError(
                f"temperature must be between {LEAST_TEMPERATURE} and {MOST_TEMPERATURE:,.0f}, got {self.temperature}"
            )


@dataclass(frozen=True)
class Term:
    """One weighted loss over the batch.

    Attributes:
      targets: of every row.
      scale: factor of each row's loss, [B], constant.
      valid: rows that take part, bool [B]; None for all. What the others hold, NaN included, reaches neither the loss
        nor a gradient.
    """

    targets: Targets
    scale: Tensor
    valid: Tensor | None

    def rows(self, index: slice) -> Term:
        """Take some rows."""
        return Term(self.targets.rows(index), self.scale[index], None if self.valid is None else self.valid[index])


def as_labels(labels: Labels | Tensor, ignore_index: int) -> Labels:
    """Accept a plain tensor: integers [B] are true classes, floats [B, C] the teacher's log-probabilities."""
    if not isinstance(labels, Tensor):
        return labels
    return DenseLabels(labels) if labels.is_floating_point() else HardLabels(labels, ignore_index)


@torch.no_grad()
def make_terms(
    labels: Labels, num_rows: int, num_classes: int, dtype: torch.dtype, device: torch.device, options: Options
) -> list[Term]:
    """Build the terms of a call.

    Args:
      labels: of the batch.
      num_rows: B.
      num_classes: C.
      dtype: of the computation, float32 or float64.
      device: of the logits.
      options: the call's other arguments.

    Returns:
      One or two terms.

    Raises:
      ValueError: sizes disagree or an argument is out of range.
    """
    least_class = check_call(labels, num_rows, num_classes, options)
    valid = None if options.mask is None else vector("mask", options.mask, num_rows).bool()
    if isinstance(labels, HardLabels):
        valid = _both(valid, labels.classes != labels.ignore_index)
    valid = _unless_all(valid)
    if options.objective == "slam":
        check_values("accuracy", options.accuracy, valid, least=0, most=1)
        check_values("candidates", options.candidates, valid, least=1, whole=True)
    share = 1 / denominator(options.normalizer, valid, num_rows, dtype) if options.reduction == "mean" else 1.0
    if options.weight is not None:
        scale = vector("weight", options.weight, num_rows).to(dtype) * share
    elif isinstance(share, Tensor):
        scale = share.to(dtype).expand(num_rows).contiguous()
    else:
        scale = torch.full((num_rows,), share, dtype=dtype, device=device)
    prepared = prepare(
        labels,
        num_classes,
        options.objective,
        options.temperature,
        options.accuracy,
        options.candidates,
        options.mixing,
        dtype,
        padded=least_class < 0,
        beta=options.beta,
        alpha=options.alpha,
    )
    if options.hard is None:
        return [Term(prepared, scale, valid)]
    known = HardLabels(vector("hard", options.hard, num_rows), options.ignore_index)
    _check_classes(known, num_classes)
    has_truth = known.classes != options.ignore_index
    share = options.hard_share * has_truth.to(dtype)
    true_class = Term(
        prepare(known, num_classes, options.objective, dtype=dtype), scale * share, _unless_all(_both(valid, has_truth))
    )
    return [Term(prepared, scale * (1 - share), valid), true_class]


def check_call(labels: Labels, num_rows: int, num_classes: int, options: Options) -> int:
    """Check what every form of a call has.

    Args:
      labels: of the batch.
      num_rows: B.
      num_classes: C.
      options: the call's other arguments.

    Returns:
      The least class of the labels, -1 where looking would wait for a device.

    Raises:
      ValueError: sizes disagree, a class does not exist or the normalizer is not positive.
    """
    count = len(labels.classes if isinstance(labels, HardLabels) else labels.logprobs)
    if count != num_rows:
        raise ValueError(f"labels must have the {num_rows} rows of the batch, got {count}")
    check_values("normalizer", options.normalizer, None, least=0, open_below=True)
    return _check_classes(labels, num_classes)


def denominator(
    normalizer: Tensor | float | None, valid: Tensor | None, num_rows: int, dtype: torch.dtype
) -> Tensor | float:
    """Give what the mean divides by."""
    if normalizer is not None:
        return normalizer.detach().to(dtype) if isinstance(normalizer, Tensor) else normalizer
    return max(num_rows, 1) if valid is None else valid.sum().clamp(min=1).to(dtype)


def _unless_all(valid: Tensor | None) -> Tensor | None:
    """Give None where every row counts and looking would not wait for a device."""
    return None if valid is not None and valid.is_cpu and bool(valid.all()) else valid


def _both(valid: Tensor | None, also: Tensor) -> Tensor:
    return also if valid is None else valid & also


def vector(name: str, value: Tensor, num_rows: int) -> Tensor:
    """Take an argument that has a value for every row."""
    if value.shape != (num_rows,):
        raise ValueError(f"{name} must have one value per row, [{num_rows}], got {list(value.shape)}")
    return value.detach()


def _check_classes(labels: Labels, num_classes: int) -> int:
    """Check the classes and give the least; -1, as if there were padding, where looking would wait for a device."""
    if isinstance(labels, DenseLabels) or not labels.classes.is_cpu or not labels.classes.numel():
        return -1
    classes = labels.classes
    if isinstance(labels, HardLabels):
        classes = classes.masked_fill(classes == labels.ignore_index, 0)
    least, largest = (int(bound) for bound in torch.aminmax(classes))
    if largest >= num_classes:
        raise ValueError(f"classes of the labels must be below the {num_classes} classes of the logits, got {largest}")
    if least < 0 and isinstance(labels, HardLabels):
        raise ValueError(
            f"true classes must be at least 0, or ignore_index ({labels.ignore_index}) where there is none, got {least}"
        )
    return least
