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
      kept: scaled gradient of the kept classes' logits, [B, k]; padding repeats the row's first.
      slope: scaled gradient of the rest's logit, [B, 1]; a class j of the rest has slope * exp((z_j - rest) / tau).
      rest: the rest's logit, [B, 1]; +inf where the rest is empty, so that the exponential is 0.
    """

    losses: Tensor
    kept: Tensor
    slope: Tensor
    rest: Tensor


def solve(kept_BK: Tensor, rest_B1: Tensor | None, term: Term) -> Solved:
    """Solve one term's problem.

    Args:
      kept_BK: logits of the kept classes.
      rest_B1: logit of the rest, -inf where it is empty; None when the objective has no such bucket.
      term: the term.

    Returns:
      Losses and gradients; zero for rows that do not count.
    """
    targets, scale_B = term.targets, term.scale
    v_BN = kept_BK if targets.padding is None else kept_BK.masked_fill(targets.padding, -torch.inf)
    if rest_B1 is not None:
        v_BN = torch.cat([v_BN, rest_B1], dim=1)
    loss_B, gradient_BN = bucket_losses_and_gradient(v_BN, targets)
    if term.valid is not None:
        loss_B = loss_B.masked_fill(~term.valid, 0)
        gradient_BN = gradient_BN.masked_fill(~term.valid[:, None], 0)
        scale_B = scale_B.masked_fill(~term.valid, 0)
    kept = kept_gradient(gradient_BN, targets) * scale_B[:, None]
    if rest_B1 is None:
        return Solved(
            loss_B * scale_B, kept, torch.zeros_like(kept_BK[:, :1]), torch.full_like(kept_BK[:, :1], torch.inf)
        )
    rest_B1 = rest_B1.masked_fill(torch.isneginf(rest_B1), torch.inf)
    return Solved(loss_B * scale_B, kept, gradient_BN[:, -1:] * scale_B[:, None], rest_B1)
