"""The autograd node of the learned augmented residual, the same for every backend that writes its own backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.devices import on_device_of
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
    """How to compute, and which gradients somebody wants."""

    backend: Backend
    target: Format | None
    wanted: Wanted


class LaurelFunction(torch.autograd.Function):
    """x', then its normalised form or, when that is quantised, what stands for it, the values and their scale.

    The last two results are what the backward pass needs of the forward pass: x A, and 1 / root mean square.
    """

    @staticmethod
    def forward(plan: Plan, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute; None in the places of what was not asked for."""
        operands = _operands(tensors)
        with on_device_of(operands.update):
            made = plan.backend.forward(operands, plan.target)
        if plan.target is None:
            return made.total, made.normed, None, None, made.low, made.inverse
        normed = made.total.new_zeros((), dtype=operands.update.dtype).expand(made.total.shape)
        return made.total, normed, made.values, made.scale, made.low, made.inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        """Keep what the gradients that are wanted need."""
        plan, *tensors = inputs
        wanted: Wanted = plan.wanted
        ctx.plan = plan
        ctx.dtypes = [None if x is None else x.dtype for x in tensors]
        ctx.set_materialize_grads(False)
        total, _, values, scale, low, inverse = output
        ctx.mark_non_differentiable(*(x for x in (values, scale, low, inverse) if x is not None))
        f, x, coefficients, down, up, norm_weight, previous = _operands(tuple(tensors))
        ctx.rows = (f.dtype, x.dtype, *(p.dtype for p in previous))
        ctx.save_for_backward(
            f if wanted.alpha else None, x if wanted.beta or wanted.maps else None, coefficients, down, up, norm_weight,
            total if norm_weight is not None else None, low if wanted.beta or wanted.maps else None, inverse,
            *(previous if wanted.gamma else ()),
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, total: Tensor | None, normed: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Compute the gradients in the dtypes of the operands."""
        if total is None and normed is None:
            return (None,) * (1 + len(ctx.dtypes))
        f, x, coefficients, down, up, norm_weight, stored, low, inverse, *previous = ctx.saved_tensors
        kept = Kept(ctx.rows, f, x, coefficients, down, up, norm_weight, previous, stored, low, inverse)
        # a backward pass may be called inside of autocast
        with torch.autocast(coefficients.device.type, enabled=False), on_device_of(coefficients):
            found = ctx.plan.backend.backward(kept, Slopes(total, normed), ctx.plan.wanted)
        # previous may be empty where none is wanted
        flat = [*found[:FIXED], *(found.previous or [None] * (len(ctx.dtypes) - FIXED))]
        return None, *(None if g is None else g.to(dtype) for g, dtype in zip(flat, ctx.dtypes, strict=True))


def wanted_of(tensors: tuple[Tensor | None, ...], learned: tuple[bool, bool, bool]) -> Wanted:
    """Say which gradients somebody wants of the operands, in the order of `LaurelFunction`'s."""
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    update, residual, coefficients, down, up, norm_weight, *previous = needed
    alpha, beta, gamma = (one and coefficients for one in learned)
    return Wanted(update, residual, alpha, beta, gamma, down or up, norm_weight, any(previous))


def _operands(tensors: tuple[Tensor | None, ...]) -> Operands:
    f, x, coefficients, down, up, norm_weight, *previous = tensors
    assert f is not None
    assert x is not None
    assert coefficients is not None
    return Operands(f, x, coefficients, down, up, norm_weight, [p for p in previous if p is not None])
