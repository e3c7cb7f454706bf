"""What stands between the two passes of the fused last layer: the problem over the buckets, solved for one term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distilbeam.kernels.distillation.closed_form import bucket_losses_and_gradient
from distilbeam.kernels.distillation.sweep import kept_gradient
from distilbeam.kernels.distillation.terms import Term


@dataclass(frozen=True)
class Solved:
    """A term whose buckets' logits are known.

    Attributes:
      losses: scaled, [B].
      kept: scaled gradient of the kept classes' logits, [B, k], to be added up by class; 0 for padding.
      slope: scaled gradient of the rest's logit over the rest's sum, [B, 1]: a class j of the rest has
        slope * exp((z_j - top) / tau).
      top: the rest's largest logit, [B, 1]; +inf where the rest is empty, so that the exponential is 0.
    """

    losses: Tensor
    kept: Tensor
    slope: Tensor
    top: Tensor


def solve(kept_BK: Tensor, rest: tuple[Tensor, Tensor] | None, term: Term) -> Solved:
    """Solve one term's problem.

    Args:
      kept_BK: logits of the kept classes.
      rest: largest logit of the rest [B, 1], -inf where it is empty, and the sum of exp((z - largest) / tau) over it
        [B, 1]; None when the objective has no such bucket.
      term: the term.

    Returns:
      Losses and gradients; zero for rows that do not count.
    """
    targets, scale_B = term.targets, term.scale
    v_BN = kept_BK if targets.padding is None else kept_BK.masked_fill(targets.padding, -torch.inf)
    if rest is not None:
        v_BN = _with_rest(v_BN, *rest, targets.rest_temperature or 1.0)
    loss_B, gradient_BN = bucket_losses_and_gradient(v_BN, targets)
    if term.valid is not None:
        loss_B = loss_B.masked_fill(~term.valid, 0)
        gradient_BN = gradient_BN.masked_fill(~term.valid[:, None], 0)
        scale_B = scale_B.masked_fill(~term.valid, 0)
    kept = kept_gradient(gradient_BN, targets) * scale_B[:, None]
    if rest is None:
        return Solved(
            loss_B * scale_B, kept, torch.zeros_like(kept_BK[:, :1]), torch.full_like(kept_BK[:, :1], torch.inf)
        )
    top_B1, sum_B1 = rest
    empty_B1 = torch.isneginf(top_B1)
    slope_B1 = gradient_BN[:, -1:] * scale_B[:, None] / sum_B1.masked_fill(empty_B1, 1)
    return Solved(loss_B * scale_B, kept, slope_B1, top_B1.masked_fill(empty_B1, torch.inf))


def _with_rest(kept_BK: Tensor, top_B1: Tensor, sum_B1: Tensor, tau: float) -> Tensor:
    """Join the buckets' logits, counted from the largest, so that a common offset takes no digits from them."""
    largest_B1 = torch.maximum(top_B1, kept_BK.amax(dim=1, keepdim=True))
    largest_B1 = largest_B1.masked_fill(torch.isneginf(largest_B1), 0)
    return torch.cat([kept_BK - largest_B1, top_B1 - largest_B1 + tau * sum_B1.log()], dim=1)
