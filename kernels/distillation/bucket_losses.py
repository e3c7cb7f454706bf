"""From the buckets' logits, as an operation of torch found them, to the scaled loss, in plain torch without a branch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distilbeam.kernels.distillation.reference import bucket_losses
from distilbeam.kernels.distillation.terms import Term

Find = Callable[[Tensor, float], tuple[Tensor, ...]]


def scaled_losses(find: Find, term: Term) -> Tensor:
    """Compute a term's losses.

    Args:
      find: from the kept classes, int32 [B, K], and tau to the kept logits [B, K], the rest's [B, 1] and what
        else there is.
      term: with sparse labels.

    Returns:
      Differentiable, [B]; 0, and no gradient, for rows that do not count.
    """
    targets = term.targets
    assert targets.classes is not None
    tau = targets.rest_temperature
    kept_BK, rest_B1, *_ = find(targets.classes.to(torch.int32), 1.0 if tau is None else tau)
    v_BN = kept_BK if targets.padding is None else kept_BK.masked_fill(targets.padding, -torch.inf)
    if tau is not None:
        v_BN = torch.cat([v_BN, rest_B1], dim=1)
    if term.valid is None:
        return bucket_losses(v_BN, targets) * term.scale
    ignored_B1 = ~term.valid[:, None]
    loss_B = bucket_losses(v_BN.masked_fill(ignored_B1, 0), targets)
    return (loss_B * term.scale).masked_fill(ignored_B1[:, 0], 0)
