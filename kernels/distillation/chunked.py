"""Value and gradient in one sweep over the logits, a block of rows at a time, on any device.

The gradient is made in the forward pass in blocks that fit the cache, so that nothing but the gradient itself is kept:
one tensor of [B, C] where autograd through the reference keeps several.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.distillation.sweep import replace_by_gradient, write_gradient
from distilbeam.kernels.distillation.terms import Term

BLOCK_ELEMENTS = 1 << 20  # 4 MiB of float32: a block stays in the last-level cache, and operations are few


def total(logits_BC: Tensor, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss.

    Args:
      logits_BC: the student's logits, floating [B, C], of any strides.
      terms: from `make_terms`.
      reduced: whether to add the rows up.

    Returns:
      A scalar, or the rows' losses [B]; differentiable once.
    """
    value: Tensor = _Sweep.apply(logits_BC, list(terms), reduced)
    return value


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BC: Tensor, terms: list[Term], reduced: bool) -> Tensor:
        gradient_BC = torch.empty(logits_BC.shape, dtype=logits_BC.dtype, device=logits_BC.device)
        step = max(1, BLOCK_ELEMENTS // max(1, logits_BC.shape[1]))
        if step >= len(logits_BC):
            losses_B = _sweep(logits_BC, gradient_BC, terms)
        else:
            blocks = [slice(start, start + step) for start in range(0, len(logits_BC), step)]
            parts = [_sweep(logits_BC[b], gradient_BC[b], [term.rows(b) for term in terms]) for b in blocks]
            losses_B = torch.cat(parts)
        ctx.save_for_backward(gradient_BC)
        return losses_B.sum() if reduced else losses_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient_BC,) = ctx.saved_tensors
        if upstream.ndim == 0 and upstream.is_cpu and float(upstream) == 1:
            return gradient_BC, None, None  # the loss itself was differentiated: nothing left to multiply
        factor = upstream if upstream.ndim == 0 else upstream[:, None]
        return gradient_BC * factor.to(gradient_BC.dtype), None, None


def _sweep(logits_BC: Tensor, gradient_BC: Tensor, terms: list[Term]) -> Tensor:
    """Fill `gradient_BC` and give the rows' losses; logits of another dtype are computed with in a block of their own."""
    compute = terms[0].scale.dtype
    if gradient_BC.dtype == compute:
        losses_B = write_gradient(logits_BC, terms[0], gradient_BC) if len(terms) == 1 else None
        return replace_by_gradient(gradient_BC.copy_(logits_BC), terms) if losses_B is None else losses_B
    block_BC = logits_BC.to(compute)
    losses_B = replace_by_gradient(block_BC, terms)
    gradient_BC.copy_(block_BC)
    return losses_B
