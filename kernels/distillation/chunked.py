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

from distilbeam.kernels.distillation.one_pass import loss_and_gradient
from distilbeam.kernels.distillation.sweep import replace_by_gradient
from distilbeam.kernels.distillation.terms import Term

BLOCK_ELEMENTS = 1 << 18  # 1 MiB of float32: a block and the few tensors of its size stay in the cache


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
        step = max(1, BLOCK_ELEMENTS // max(1, logits_BC.shape[1]))
        if step >= len(logits_BC):
            loss, gradient_BC = _block(logits_BC, terms, reduced, None)
        else:
            gradient_BC = torch.empty(logits_BC.shape, dtype=logits_BC.dtype, device=logits_BC.device)
            blocks = [slice(start, start + step) for start in range(0, len(logits_BC), step)]
            parts = [_block(logits_BC[b], [t.rows(b) for t in terms], reduced, gradient_BC[b])[0] for b in blocks]
            loss = torch.stack(parts).sum() if reduced else torch.cat(parts)
        ctx.save_for_backward(gradient_BC)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient_BC,) = ctx.saved_tensors
        if upstream.ndim == 0 and upstream.is_cpu and float(upstream) == 1:
            return gradient_BC, None, None  # the loss itself was differentiated: nothing left to multiply
        factor = upstream if upstream.ndim == 0 else upstream[:, None]
        return gradient_BC * factor.to(gradient_BC.dtype), None, None


def _block(logits_BC: Tensor, terms: list[Term], reduced: bool, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Give the loss and the gradient, in `out` where that is given; logits of another dtype are widened here."""
    compute, dtype = terms[0].scale.dtype, logits_BC.dtype
    wide_BC = logits_BC if dtype == compute else logits_BC.to(compute)
    room = out if dtype == compute else None
    made = loss_and_gradient(wide_BC, terms[0], reduced, room)
    for term in terms[1:]:
        more = None if made is None else loss_and_gradient(wide_BC, term, reduced)
        made = None if made is None or more is None else (made[0] + more[0], made[1].add_(more[1]))
    if made is None:
        made = _with_masks(wide_BC, terms, reduced, room)
    loss, gradient_BC = made
    if dtype == compute:
        return made
    return loss, gradient_BC.to(dtype) if out is None else out.copy_(gradient_BC)


def _with_masks(logits_BC: Tensor, terms: list[Term], reduced: bool, out: Tensor | None) -> tuple[Tensor, Tensor]:
    copy_BC = logits_BC.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(logits_BC)
    losses_B = replace_by_gradient(copy_BC, terms)
    return losses_B.sum() if reduced else losses_B, copy_BC
