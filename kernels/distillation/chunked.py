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

from distilbeam.kernels.distillation.sweep import replace_by_gradient
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
    rows_B: Tensor = _Sweep.apply(logits_BC, list(terms))
    return rows_B.sum() if reduced else rows_B


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BC: Tensor, terms: list[Term]) -> Tensor:
        compute = terms[0].scale.dtype
        losses_B = torch.empty_like(terms[0].scale)
        gradient_BC = torch.empty(logits_BC.shape, dtype=logits_BC.dtype, device=logits_BC.device)
        step = max(1, BLOCK_ELEMENTS // max(1, logits_BC.shape[1]))
        for start in range(0, len(logits_BC), step):
            rows = slice(start, start + step)
            block_BC = gradient_BC[rows] if gradient_BC.dtype == compute else torch.empty(0)
            block_BC = logits_BC[rows].to(compute) if block_BC.numel() == 0 else block_BC.copy_(logits_BC[rows])
            losses_B[rows] = replace_by_gradient(block_BC, [term.rows(rows) for term in terms])
            if gradient_BC.dtype != compute:
                gradient_BC[rows] = block_BC
        ctx.save_for_backward(gradient_BC)
        return losses_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_B: Tensor) -> tuple[Tensor, None]:
        (gradient_BC,) = ctx.saved_tensors
        if upstream_B.numel() and upstream_B.is_cpu and bool((upstream_B == 1).all()):
            return gradient_BC, None  # the loss itself was differentiated: nothing left to multiply
        return gradient_BC * upstream_B[:, None].to(gradient_BC.dtype), None
