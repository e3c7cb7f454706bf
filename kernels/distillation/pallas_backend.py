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
        # gradients of several terms are added before they are rounded: what cancels would leave the rounding
        wide_BC = logits_BC if len(terms) == 1 else logits_BC.float()
        losses_B = torch.stack([scaled_losses(lambda c, tau: find(wide_BC, c, tau), term) for term in terms]).sum(0)
    return losses_B.sum() if reduced else losses_B


@once
def logit_buckets() -> Any:
    """Give the operation that finds the buckets' logits; its derivative spreads their gradients over the logits."""

    def find(logits: jax.Array, classes: jax.Array, tau: float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        return pallas_kernels.logit_buckets(logits, classes, tau)

    def spread(
        logits: jax.Array, classes: jax.Array, kept: jax.Array, slope: jax.Array, top: jax.Array, tau: float
    ) -> jax.Array:
        return pallas_kernels.logit_gradient(logits, classes, kept, slope, top, tau)

    buckets = register("logit_buckets", find, _find, _find_like)
    gradient = register("logit_gradient", spread, _spread, lambda logits, *_: torch.empty_like(logits))
    buckets_with_gradient(buckets, gradient)
    return buckets


def _find(logits: Tensor, classes: Tensor, tau: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = interpreted(pallas_kernels.logit_buckets, logits, classes, tau)
    if made is not None:
        return made[0], made[1], made[2], made[3]
    z_BC = logits.float()
    kept_BK, others_BC = z_BC.gather(1, classes.long()), z_BC.scatter(1, classes.long(), -torch.inf)
    top_B1 = others_BC.amax(dim=1, keepdim=True)
    safe_B1 = top_B1.masked_fill(torch.isneginf(top_B1), 0)
    total_B1 = ((others_BC - safe_B1) / tau).exp().sum(dim=1, keepdim=True)
    largest_B1 = torch.maximum(top_B1, kept_BK.amax(dim=1, keepdim=True))
    largest_B1 = largest_B1.masked_fill(torch.isneginf(largest_B1), 0)
    return kept_BK - largest_B1, top_B1 - largest_B1 + tau * total_B1.log(), top_B1, total_B1


def _find_like(logits: Tensor, classes: Tensor, *_: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = logits.new_empty(classes.shape, dtype=torch.float32)
    rest, top, total = (logits.new_empty(len(logits), 1, dtype=torch.float32) for _ in range(3))
    return kept, rest, top, total


def _spread(logits: Tensor, classes: Tensor, kept: Tensor, slope: Tensor, top: Tensor, tau: float) -> Tensor:
    made = interpreted(pallas_kernels.logit_gradient, logits, classes, kept, slope, top, tau)
    if made is not None:
        return made[0]
    classes_BK = classes.long()
    gradient_BC = torch.where(slope == 0, 0, slope * torch.exp((logits.float() - top) / tau))
    return gradient_BC.scatter(1, classes_BK, 0).scatter_add(1, classes_BK, kept).to(logits.dtype)
