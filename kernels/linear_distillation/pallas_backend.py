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
from distilbeam.kernels.linear_distillation.buckets import solve
from distilbeam.kernels.linear_distillation.gradients import Gradients, apply_fused
from distilbeam.kernels.linear_distillation.operands import Layer, Operands
from distilbeam.kernels.tpu_operations import buckets_with_gradient, interpreted, once, register


def total(layer: Layer, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss; see `chunked.total`."""
    if layer.operands.hidden is not layer.leaves[0]:  # in fewer bits: what is multiplied has no gradient
        return apply_fused(_run, layer, terms, reduced)
    arrays = _arrays(layer.operands)
    if not len(arrays[0]):
        losses_B = (arrays[0].float() @ arrays[1].float().T + arrays[4]).sum(dim=1)
    else:
        find = layer_buckets()
        losses_B = torch.stack([scaled_losses(lambda c, tau: find(*arrays, c, tau), term) for term in terms]).sum(0)
    return losses_B.sum() if reduced else losses_B


def _run(operands: Operands, terms: Sequence[Term], wanted: Sequence[bool]) -> tuple[Tensor, Gradients]:
    sums, losses_B = Gradients.zeros(operands, wanted, torch.float32), torch.zeros_like(terms[0].scale)
    arrays = _arrays(operands)
    for term in terms if len(operands.hidden) else ():
        targets = term.targets
        assert targets.classes is not None
        classes, tau = targets.classes.to(torch.int32), targets.rest_temperature
        kept_BK, rest_B1 = layer_buckets()(*arrays, classes, 1.0 if tau is None else tau)
        solved = solve(kept_BK, None if tau is None else rest_B1, term)
        losses_B += solved.losses
        if any(wanted):
            found = _gradients()(*arrays, classes, solved.kept, solved.slope, solved.rest, 1.0 if tau is None else tau)
            for total, one in zip(sums, found, strict=True):
                if total is not None:
                    total += one
    return losses_B, sums


def _arrays(operands: Operands) -> tuple[Tensor, ...]:
    """Give the operands as the operations take them; scales of one, which nobody looks at, where there are none."""
    hidden, weight, bias, row_scale, class_scale = operands
    rows, classes = (torch.ones(len(x), device=x.device) for x in (hidden, weight))
    return (
        hidden,
        weight,
        rows[:, None] if row_scale is None else row_scale,
        classes if class_scale is None else class_scale[:, 0].contiguous(),
        torch.zeros_like(classes) if bias is None else bias.float(),
    )


@once
def layer_buckets() -> Any:
    """Give the operation that finds the buckets' logits; its derivative brings their gradients to the layer."""

    def find(
        hidden: jax.Array,
        weight: jax.Array,
        row_scale: jax.Array,
        class_scale: jax.Array,
        bias: jax.Array,
        classes: jax.Array,
        tau: float,
    ) -> tuple[jax.Array, jax.Array]:
        return pallas_kernels.first_pass(hidden, weight, row_scale, class_scale, bias, classes, tau)

    buckets = register("layer_buckets", find, _find, _find_like)
    buckets_with_gradient(buckets, _gradients(), differentiable=(0, 1, 4))
    return buckets


@once
def _gradients() -> Any:
    def spread(
        hidden: jax.Array,
        weight: jax.Array,
        row_scale: jax.Array,
        class_scale: jax.Array,
        bias: jax.Array,
        classes: jax.Array,
        kept: jax.Array,
        slope: jax.Array,
        rest: jax.Array,
        tau: float,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        layer = hidden, weight, row_scale, class_scale, bias
        return pallas_kernels.gradients(*layer, classes, kept, slope, rest, tau)

    return register("layer_gradients", spread, _spread, _spread_like)


def _find(
    hidden: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    class_scale: Tensor,
    bias: Tensor,
    classes: Tensor,
    tau: float,
) -> tuple[Tensor, Tensor]:
    made = interpreted(pallas_kernels.first_pass, hidden, weight, row_scale, class_scale, bias, classes, tau)
    if made is not None:
        return made[0], made[1]
    z_BC = torch.nn.functional.linear(hidden.float() * row_scale, weight.float() * class_scale[:, None], bias)
    others_BC = z_BC.scatter(1, classes.long(), -torch.inf)
    return z_BC.gather(1, classes.long()), tau * torch.logsumexp(others_BC / tau, dim=1, keepdim=True)


def _find_like(
    hidden: Tensor, _weight: Tensor, _row: Tensor, _class: Tensor, bias: Tensor, classes: Tensor, *_more: float
) -> tuple[Tensor, Tensor]:
    return bias.new_empty(classes.shape), bias.new_empty(len(hidden), 1)


def _spread(
    hidden: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    class_scale: Tensor,
    bias: Tensor,
    classes: Tensor,
    kept: Tensor,
    slope: Tensor,
    rest: Tensor,
    tau: float,
) -> tuple[Tensor, Tensor, Tensor]:
    layer = hidden, weight, row_scale, class_scale, bias
    made = interpreted(pallas_kernels.gradients, *layer, classes, kept, slope, rest, tau)
    if made is not None:
        return made[0], made[1], made[2]
    wide_BH, wide_CH = hidden.float() * row_scale, weight.float() * class_scale[:, None]
    z_BC = torch.nn.functional.linear(wide_BH, wide_CH, bias)
    gradient_BC = spread_over(z_BC, classes.long(), kept, slope, rest, tau)
    return gradient_BC @ wide_CH, gradient_BC.T @ wide_BH, gradient_BC.sum(dim=0)


def _spread_like(
    hidden: Tensor, weight: Tensor, _row: Tensor, _class: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape, dtype=torch.float32) for x in (hidden, weight, bias))  # type: ignore[return-value]
