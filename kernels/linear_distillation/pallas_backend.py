"""The fused last layer and loss through the Pallas kernels, as operations of torch; imported when it is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import torch
from torch import Tensor

from distilbeam.kernels.distillation.bucket_losses import scaled_losses
from distilbeam.kernels.distillation.pallas_backend import spread_over
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation import pallas_kernels
from distilbeam.kernels.tpu_operations import buckets_with_gradient, interpreted, once, register


def total(hidden_BH: Tensor, weight_CH: Tensor, bias_C: Tensor | None, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss; see `chunked.total`."""
    bias = hidden_BH.new_zeros(len(weight_CH), dtype=torch.float32) if bias_C is None else bias_C.float()
    if not len(hidden_BH):
        losses_B = (hidden_BH.float() @ weight_CH.float().T + bias).sum(dim=1)
    else:
        find = layer_buckets()
        layer = hidden_BH, weight_CH, bias
        losses_B = torch.stack([scaled_losses(lambda c, tau: find(*layer, c, tau), term) for term in terms]).sum(0)
    return losses_B.sum() if reduced else losses_B


@once
def layer_buckets() -> Any:
    """Give the operation that finds the buckets' logits; its derivative brings their gradients to the layer."""

    def find(
        hidden: jax.Array, weight: jax.Array, bias: jax.Array, classes: jax.Array, tau: float
    ) -> tuple[jax.Array, jax.Array]:
        return pallas_kernels.first_pass(hidden, weight, bias, classes, tau)

    def spread(
        hidden: jax.Array,
        weight: jax.Array,
        bias: jax.Array,
        classes: jax.Array,
        kept: jax.Array,
        slope: jax.Array,
        rest: jax.Array,
        tau: float,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return pallas_kernels.gradients(hidden, weight, bias, classes, kept, slope, rest, tau)

    buckets = register("layer_buckets", find, _find, _find_like)
    gradient = register("layer_gradients", spread, _spread, _spread_like)
    buckets_with_gradient(buckets, gradient, differentiable=3)
    return buckets


def _find(hidden: Tensor, weight: Tensor, bias: Tensor, classes: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    made = interpreted(pallas_kernels.first_pass, hidden, weight, bias, classes, tau)
    if made is not None:
        return made[0], made[1]
    z_BC = torch.nn.functional.linear(hidden.float(), weight.float(), bias)
    others_BC = z_BC.scatter(1, classes.long(), -torch.inf)
    return z_BC.gather(1, classes.long()), tau * torch.logsumexp(others_BC / tau, dim=1, keepdim=True)


def _find_like(hidden: Tensor, _: Tensor, bias: Tensor, classes: Tensor, *_more: float) -> tuple[Tensor, Tensor]:
    return bias.new_empty(classes.shape), bias.new_empty(len(hidden), 1)


def _spread(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    classes: Tensor,
    kept: Tensor,
    slope: Tensor,
    rest: Tensor,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    made = interpreted(pallas_kernels.gradients, hidden, weight, bias, classes, kept, slope, rest, tau)
    if made is not None:
        return made[0], made[1], made[2]
    z_BC = torch.nn.functional.linear(hidden.float(), weight.float(), bias)
    gradient_BC = spread_over(z_BC, classes.long(), kept, slope, rest, tau)
    return gradient_BC @ weight.float(), gradient_BC.T @ hidden.float(), gradient_BC.sum(dim=0)


def _spread_like(hidden: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape, dtype=torch.float32) for x in (hidden, weight, bias))  # type: ignore[return-value]
