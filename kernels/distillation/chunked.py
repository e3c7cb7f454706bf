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
    terms = list(terms)
    if not (torch.is_grad_enabled() and logits_BC.requires_grad):
        return _swept(logits_BC, terms, reduced, wanted=False)[0]
    value: Tensor = _Sweep.apply(logits_BC, terms, reduced)[0]
    return value


class _Sweep(torch.autograd.Function):
    """The loss, and the gradient that its backward pass hands on."""

    @staticmethod
    def forward(logits_BC: Tensor, terms: list[Term], reduced: bool) -> tuple[Tensor, Tensor]:
        loss, gradient_BC = _swept(logits_BC, terms, reduced, wanted=True)
        assert gradient_BC is not None
        return loss, gradient_BC

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
        if upstream is None:
            return None, None, None
        (gradient_BC,) = ctx.saved_tensors
        if upstream.ndim == 0 and upstream.is_cpu and float(upstream) == 1:
            return gradient_BC, None, None  # the loss itself was differentiated: nothing left to multiply
        factor = upstream if upstream.ndim == 0 else upstream[:, None]
        return gradient_BC * factor.to(gradient_BC.dtype), None, None


def _swept(logits_BC: Tensor, terms: list[Term], reduced: bool, *, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Compute the loss, a scalar or [B], and the gradient where it is wanted."""
    step = max(1, BLOCK_ELEMENTS // max(1, logits_BC.shape[1]))
    if step >= len(logits_BC):
        return _block(logits_BC, terms, reduced, None, wanted)
    gradient_BC = torch.empty(logits_BC.shape, dtype=logits_BC.dtype, device=logits_BC.device) if wanted else None
    blocks = [slice(start, start + step) for start in range(0, len(logits_BC), step)]
    parts = [
        _block(
            logits_BC[b], [t.rows(b) for t in terms], reduced, None if gradient_BC is None else gradient_BC[b], wanted
        )
        for b in blocks
    ]
    losses = [loss for loss, _ in parts]
    return torch.stack(losses).sum() if reduced else torch.cat(losses), gradient_BC


def _block(
    logits_BC: Tensor, terms: list[Term], reduced: bool, out: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Give the loss and the gradient, in `out` where that is given; logits of another dtype are widened here."""
    compute, dtype = terms[0].scale.dtype, logits_BC.dtype
    wide_BC = logits_BC if dtype == compute else logits_BC.to(compute)
    room = out if dtype == compute else None
    loss, gradient_BC = _of_all(wide_BC, terms, reduced, room, wanted) or _with_masks(wide_BC, terms, reduced, room)
    if not wanted or dtype == compute:
        return loss, gradient_BC
    assert gradient_BC is not None
    return loss, gradient_BC.to(dtype) if out is None else out.copy_(gradient_BC)


def _of_all(
    logits_BC: Tensor, terms: list[Term], reduced: bool, out: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Add up the terms, each in one pass; None where one of them cannot be computed so."""
    loss, gradient_BC = None, None
    for number, term in enumerate(terms):
        made = loss_and_gradient(logits_BC, term, reduced, None if number else out, wanted=wanted)
        if made is None:
            return None
        loss = made[0] if loss is None else loss + made[0]
        gradient_BC = made[1] if gradient_BC is None or made[1] is None else gradient_BC.add_(made[1])
    assert loss is not None
    return loss, gradient_BC


def _with_masks(logits_BC: Tensor, terms: list[Term], reduced: bool, out: Tensor | None) -> tuple[Tensor, Tensor]:
    copy_BC = logits_BC.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(logits_BC)
    losses_B = replace_by_gradient(copy_BC, terms)
    return losses_B.sum() if reduced else losses_B, copy_BC
