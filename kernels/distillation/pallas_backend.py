"""The losses of given logits through the Pallas kernels, as operations of torch; imported when it is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import torch
from torch import Tensor

from distilbeam.kernels.distillation import pallas_kernels
from distilbeam.kernels.distillation.bucket_losses import scaled_losses
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.tpu_operations import buckets_with_gradient, interpreted, once, register


def total(logits_BC: Tensor, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss; see `chunked.total`."""
    if not len(logits_BC):
        losses_B = logits_BC.float().sum(dim=1)
    else:
        find = logit_buckets()
        losses_B = torch.stack([scaled_losses(lambda c, tau: find(logits_BC, c, tau), term) for term in terms]).sum(0)
    return losses_B.sum() if reduced else losses_B


@once
def logit_buckets() -> Any:
    """Give the operation that finds the buckets' logits; its derivative spreads their gradients over the logits."""

    def find(logits: jax.Array, classes: jax.Array, tau: float) -> tuple[jax.Array, jax.Array]:
        return pallas_kernels.logit_buckets(logits, classes, tau)

    def spread(
        logits: jax.Array, classes: jax.Array, kept: jax.Array, slope: jax.Array, rest: jax.Array, tau: float
    ) -> jax.Array:
        return pallas_kernels.logit_gradient(logits, classes, kept, slope, rest, tau)

    buckets = register("logit_buckets", find, _find, _find_like)
    gradient = register("logit_gradient", spread, _spread, lambda logits, *_: torch.empty_like(logits))
    buckets_with_gradient(buckets, gradient, differentiable=(0,))
    return buckets


def _find(logits: Tensor, classes: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    made = interpreted(pallas_kernels.logit_buckets, logits, classes, tau)
    if made is not None:
        return made[0], made[1]
    z_BC = logits.float()
    others_BC = z_BC.scatter(1, classes.long(), -torch.inf)
    return z_BC.gather(1, classes.long()), tau * torch.logsumexp(others_BC / tau, dim=1, keepdim=True)


def _find_like(logits: Tensor, classes: Tensor, *_: float) -> tuple[Tensor, Tensor]:
    return logits.new_empty(classes.shape, dtype=torch.float32), logits.new_empty(len(logits), 1, dtype=torch.float32)


def _spread(logits: Tensor, classes: Tensor, kept: Tensor, slope: Tensor, rest: Tensor, tau: float) -> Tensor:
    made = interpreted(pallas_kernels.logit_gradient, logits, classes, kept, slope, rest, tau)
    if made is not None:
        return made[0]
    return spread_over(logits.float(), classes.long(), kept, slope, rest, tau).to(logits.dtype)


def spread_over(
    z_BC: Tensor, classes_BK: Tensor, kept_BK: Tensor, slope_B1: Tensor, rest_B1: Tensor, tau: float
) -> Tensor:
    """Spread the buckets' gradients over float32 logits [B, C] in plain torch."""
    gradient_BC = torch.where(slope_B1 == 0, 0, slope_B1 * torch.exp((z_BC - rest_B1) / tau))
    repeated_BK = classes_BK == classes_BK[:, :1]
    repeated_BK[:, 0] = False
    once_BK = kept_BK.masked_fill(repeated_BK, 0)
    return gradient_BC.scatter(1, classes_BK, 0).scatter_add(1, classes_BK, once_BK)
