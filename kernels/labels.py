"""Teacher labels as tensors: dense, top-k with a tail, sampled, hard.

Every container holds log-probabilities at temperature 1; the losses apply a temperature themselves. A batch has B rows
and C classes; sparse labels keep k of them. An entry of a sparse label whose class is negative is padding, wherever it stands.
A log-probability of -inf is a probability of 0. Classes of a row should be distinct: one that is named twice counts as two
classes of the same logit, with a probability each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DenseLabels:
    """The teacher's distribution over all classes.

    Attributes:
      logprobs: log-probabilities at temperature 1, floating [B, C]; -inf marks a class that does not exist.
    """

    logprobs: Tensor

    def __post_init__(self) -> None:
        _floating("logprobs", self.logprobs, 2)


@dataclass(frozen=True)
class TopKLabels:
    """The k most probable classes and the mass of all the others.

    Attributes:
      logprobs: log-probabilities at temperature 1, floating [B, k].
      classes: their classes, integer [B, k]; distinct within a row, negative where the entry is padding.
      tail_logmass: log of the probability that was not kept, floating [B]; None computes it from `logprobs`.
    """

    logprobs: Tensor
    classes: Tensor
    tail_logmass: Tensor | None = None

    def __post_init__(self) -> None:
        _sparse(self.logprobs, self.classes)
        if self.tail_logmass is not None and self.tail_logmass.shape != self.logprobs.shape[:1]:
            raise ValueError(
                f"tail_logmass must have one value per row, [{len(self.logprobs)}], got {list(self.tail_logmass.shape)}"
            )


@dataclass(frozen=True)
class SampledLabels:
    """Classes drawn from the teacher with their relative frequencies (RS-KD, arXiv:2503.16870).

    Attributes:
      logprobs: log of count / draws, floating [B, k]; the exponentials of a row sum to one.
      classes: the distinct classes drawn, integer [B, k]; negative where the entry is padding.
    """

    logprobs: Tensor
    classes: Tensor

    def __post_init__(self) -> None:
        _sparse(self.logprobs, self.classes)


@dataclass(frozen=True)
class HardLabels:
    """One true class per row.

    Attributes:
      classes: integer [B], at least 0; rows equal to `ignore_index` take no part in the loss.
      ignore_index: the class that marks such a row.
    """

    classes: Tensor
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if self.classes.ndim != 1 or self.classes.is_floating_point():
            raise ValueError(
                f"hard labels must be integers of shape [B], got {self.classes.dtype} {list(self.classes.shape)}"
            )


Labels = DenseLabels | TopKLabels | SampledLabels | HardLabels


def tail_logmass(logprobs_BK: Tensor) -> Tensor:
    """Compute the log of the probability that a top-k label leaves out.

    Args:
      logprobs_BK: log-probabilities of the kept classes, floating [B, k].

    Returns:
      log(1 - sum exp(logprobs)), floating [B]; log(1e-7) where rounding leaves no mass, so that it stays finite.
    """
    kept = torch.logsumexp(logprobs_BK.to(torch.promote_types(logprobs_BK.dtype, torch.float32)), dim=-1)
    return torch.log(-torch.expm1(kept.clamp(max=-1e-7)))


def _floating(name: str, value: Tensor, ndim: int) -> None:
    if value.ndim != ndim or not value.is_floating_point():
        raise ValueError(f"{name} must be floating with {ndim} dimensions, got {value.dtype} {list(value.shape)}")


def _sparse(logprobs: Tensor, classes: Tensor) -> None:
    _floating("logprobs", logprobs, 2)
    if classes.shape != logprobs.shape or classes.is_floating_point():
        raise ValueError(
            f"classes must be integers of the shape of logprobs, {list(logprobs.shape)}, "
            f"got {classes.dtype} {list(classes.shape)}"
        )
    if not classes.shape[1]:
        raise ValueError(f"sparse labels must keep at least one class, got {list(classes.shape)}")
