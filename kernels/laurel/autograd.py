"""The autograd node of the learned augmented residual, the same for every backend that writes its own backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.laurel.operands import Gradients, Kept, Made, Operands, Slopes, Wanted
from distilbeam.kernels.quantize.formats import Format

FIXED = 6  # update, residual, coefficients, down, up, norm_weight; then the earlier residuals


class Backend(Protocol):
    """A module with the two passes."""

    def forward(self, operands: Operands, target: Format | None) -> Made:
        """Compute x' and what was asked for besides."""

    def backward(self, kept: Kept, slopes: Slopes, wanted: Wanted) -> Gradients:
        """Compute the gradients that are wanted."""


class Plan(NamedTuple):
    """How to compute, and whether alpha, beta and gamma are learned."""

    backend: Backend
    target: Format | None
    learned: tuple[bool, bool, bool]


class LaurelFunction(torch.autograd.Function):
    """x', then its normalised form or, when that is quantised, what stands for it, the values and their scale."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute; None in the places of what was not asked for."""
        operands = _operands(tensors)
        made = plan.backend.forward(operands, plan.target)
        wanted = _wanted(ctx.needs_input_grad[1:], plan.learned)
        ctx.plan, ctx.wanted = plan, wanted
        ctx.dtypes = [None if x is None else x.dtype for x in tensors]
        ctx.set_materialize_grads(False)
        f, x, coefficients, down, up, norm_weight, previous = operands
        kept_x = x if wanted.beta or wanted.maps else None
        total = made.total if norm_weight is not None else None
        ctx.save_for_backward(
            f if wanted.alpha else None, kept_x, coefficients, down, up, norm_weight, total,
            made.low if wanted.beta or wanted.maps else None, made.inverse, *(previous if wanted.gamma else ()),
        )  # fmt: skip
        if plan.target is None:
            return made.total, made.normed, None, None
        assert made.values is not None
        ctx.mark_non_differentiable(made.values, made.scale)
        return made.total, made.total.new_zeros(()).expand(made.total.shape), made.values, made.scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor | None, normed: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients in the dtypes of the operands."""
        if total is None and normed is None:
            return (None,) * (1 + len(ctx.dtypes))
        f, x, coefficients, down, up, norm_weight, stored, low, inverse, *previous = ctx.saved_tensors
        kept = Kept(f, x, coefficients, down, up, norm_weight, previous, stored, low, inverse)
        with torch.autocast(coefficients.device.type, enabled=False):  # a backward pass may be called inside of one
            found = ctx.plan.backend.backward(kept, Slopes(total, normed), ctx.wanted)
        # previous may be empty where none is wanted
        flat = [*found[:FIXED], *(found.previous or [None] * (len(ctx.dtypes) - FIXED))]
        return None, *(None if g is None else g.to(dtype) for g, dtype in zip(flat, ctx.dtypes, strict=True))


def _operands(tensors: tuple[Tensor | None, ...]) -> Operands:
    f, x, coefficients, down, up, norm_weight, *previous = tensors
    assert f is not None
    assert x is not None
    assert coefficients is not None
    return Operands(f, x, coefficients, down, up, norm_weight, [p for p in previous if p is not None])


def _wanted(needed: tuple[bool, ...], learned: tuple[bool, bool, bool]) -> Wanted:
    update, residual, _, down, up, norm_weight, *previous = needed
    return Wanted(update, residual, *learned, down or up, norm_weight, any(previous))
