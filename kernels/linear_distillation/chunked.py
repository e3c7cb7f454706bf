"""Value and gradients without ever holding the logits of the whole batch, on any device.

Two orders of the same work, chosen by the number of classes:

* by rows: the logits of some rows fill a buffer, are overwritten by their gradient, and two products bring it to hidden
  and weight. Three products of 2 B H C operations in all.
* by classes, when too few rows of all classes fit the buffer to keep a product busy, or when the weight must be brought
  to float32: a first pass over tiles of classes finds every row's buckets, a second one recomputes each tile and
  overwrites it by its gradient. Four products; besides the gradients only the buffer and [B, k] tensors are held.

When the rows' losses are wanted one by one, their gradients wait for the factors of the backward pass and are computed
there. Memory: the gradients, and a buffer of at most 32 MiB in float32, whatever the number of classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation.by_classes import sweep_classes
from distilbeam.kernels.linear_distillation.by_rows import sweep_rows

BUFFER_ELEMENTS = 1 << 23
FEWEST_ROWS = 96  # below this a product by rows wastes more than the fourth product by classes costs


class Gradients(NamedTuple):
    """Accumulators in the dtype of the computation; None where nobody asked."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def total(hidden_BH: Tensor, weight_CH: Tensor, bias_C: Tensor | None, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss.

    Args:
      hidden_BH: inputs of the last layer, floating [B, H].
      weight_CH: its weight, floating [C, H].
      bias_C: its bias, floating [C], or None.
      terms: from `make_terms`.
      reduced: whether to add the rows up.

    Returns:
      A scalar, or the rows' losses [B]; differentiable once.
    """
    value: Tensor = _Fused.apply(hidden_BH, weight_CH, bias_C, list(terms), reduced)
    return value


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_BH: Tensor, weight_CH: Tensor, bias_C: Tensor | None, terms: list[Term], reduced: bool
    ) -> Tensor:
        ctx.terms, ctx.reduced = terms, reduced
        if not reduced:
            ctx.save_for_backward(hidden_BH, weight_CH, bias_C)
            return _run(hidden_BH, weight_CH, bias_C, terms, (False, False, False))[0]
        losses_B, gradients = _run(hidden_BH, weight_CH, bias_C, terms, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        return losses_B.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.reduced:
            terms = [Term(term.targets, term.scale * upstream, term.valid) for term in ctx.terms]
            hidden_BH, weight_CH, bias_C = ctx.saved_tensors
            gradients = _run(hidden_BH, weight_CH, bias_C, terms, ctx.needs_input_grad[:3])[1]
            return *gradients, None, None
        unit = upstream.is_cpu and float(upstream) == 1.0  # the loss itself was differentiated
        scaled = [g if g is None or unit else g * upstream.to(g.dtype) for g in ctx.saved_tensors]
        return *scaled, None, None


def _run(
    hidden_BH: Tensor, weight_CH: Tensor, bias_C: Tensor | None, terms: Sequence[Term], wanted: Sequence[bool]
) -> tuple[Tensor, Gradients]:
    compute = terms[0].scale.dtype
    operands = (hidden_BH, weight_CH, bias_C)
    sums = Gradients(
        *(
            torch.zeros(x.shape, dtype=compute, device=x.device) if want and x is not None else None
            for x, want in zip(operands, wanted, strict=True)
        )
    )
    rows = BUFFER_ELEMENTS // max(1, len(weight_CH))
    dense = any(term.targets.classes is None for term in terms)
    exact = hidden_BH.dtype == weight_CH.dtype == compute
    bias = None if bias_C is None else bias_C.to(compute)
    if dense or (exact and rows >= min(FEWEST_ROWS, len(hidden_BH))):
        losses_B = sweep_rows(hidden_BH.to(compute), weight_CH.to(compute), bias, terms, sums, max(1, rows))
    else:
        losses_B = sweep_classes(hidden_BH.to(compute), weight_CH, bias, terms, sums, BUFFER_ELEMENTS // 4)
    return losses_B, Gradients(*(_like(x, value) for x, value in zip(operands, sums, strict=True)))


def _like(operand: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return None if operand is None or gradient is None else gradient.to(operand.dtype)
