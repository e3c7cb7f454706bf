"""The fused last layer with its logits in 16 bits, overwritten by their gradient; imported when it is asked for.

The library's product makes the logits in the dtype of the layer, or, of rows in fp8, in bfloat16; one kernel
(`distillation/triton_one_kernel.py`) makes their loss and puts their gradient in their place. Where all of them fit
ROWS_BYTES they are held until the backward pass, which needs two products and nothing else: what comes from above goes into
the few columns that are multiplied, whatever the reduction,

    dx = u (dZ W),     dW = dZ^T (u x),     db = u^T dZ

where u is the factor of every row. Else, a part of the rows at a time, the gradients are made in the forward pass. Beside the
float32 logits of `triton_backend.py`: half the memory, and one pass over the logits less. Not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.compiling import not_narrowed
from distilbeam.kernels.devices import on_device_of
from distilbeam.kernels.distillation import triton_given_backend as of_logits
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation.gradients import Gradients, apply_fused
from distilbeam.kernels.linear_distillation.operands import Layer, Operands
from distilbeam.kernels.linear_distillation.triton_backend import (
    add_products,
    gradient_dtype,
    product,
    room_for_sums,
    rows_at_once,
)
from distilbeam.kernels.low_precision.products import scaled_mm

WIDTH = 16  # rows of logits begin a multiple of as many numbers apart


def total(layer: Layer, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss of one term; see `chunked.total`."""
    (term,), operands = terms, layer.operands
    count, classes = len(operands.hidden), len(operands.weight)
    leaves = layer.leaves
    if rows_at_once(count, 2 * classes) < count:
        return apply_fused(partial(_in_parts, (leaves[0].dtype, leaves[1].dtype)), layer, terms, reduced)
    call = _Call(term, tuple(None if x is None else x.dtype for x in leaves))
    rows_B: Tensor = _Held.apply(call, *operands, *leaves)[0]
    return rows_B.sum() if reduced else rows_B


class _Call(NamedTuple):
    """A call, but for its tensors.

    Attributes:
      term: of all rows.
      dtypes: of the gradients of hidden, weight and bias.
    """

    term: Term
    dtypes: tuple[torch.dtype | None, ...]


OPERANDS = len(Operands._fields)


class _Held(torch.autograd.Function):
    """The rows' losses and the logits' gradient, which is kept for the two products of the backward pass."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        operands = Operands(*tensors[:OPERANDS])  # type: ignore[arg-type]
        with not_narrowed(operands.hidden.device.type), on_device_of(operands.hidden):
            return _loss_and_slopes(operands, call.term)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.call = inputs[0]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], *inputs[1 : 1 + OPERANDS])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_B: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (1 + OPERANDS)
        if upstream_B is None:
            return *nothing, None, None, None
        slope_BC, *saved = ctx.saved_tensors
        operands, wanted = Operands(*saved), ctx.needs_input_grad[1 + OPERANDS :]
        with not_narrowed(slope_BC.device.type), on_device_of(slope_BC):
            sums = Gradients.empty(operands, wanted, torch.float32).like(ctx.call.dtypes)
            _products(operands, slope_BC, upstream_B, sums)
        return *nothing, *sums


def _loss_and_slopes(operands: Operands, term: Term) -> tuple[Tensor, Tensor]:
    """Compute the rows' losses and the gradient by their logits."""
    logits_BC = _logits(operands)
    losses_B = torch.empty_like(term.scale)
    if len(logits_BC):
        of_logits.in_place(logits_BC, term, losses_B)
    return losses_B, logits_BC


def _logits(operands: Operands) -> Tensor:
    """Multiply, into rows that begin on 16 bytes."""
    hidden_BH, weight_CH, bias_C, hidden_scale, weight_scale = operands
    rows, classes = len(hidden_BH), len(weight_CH)
    if hidden_scale is not None:
        assert weight_scale is not None
        whole = scaled_mm(hidden_BH, hidden_scale, weight_CH, weight_scale, bias_C, torch.bfloat16)
        return whole if rows and whole.stride(0) % WIDTH == 0 else _room(rows, classes, whole).copy_(whole)
    room = _room(rows, classes, hidden_BH)
    if bias_C is None:
        return torch.mm(hidden_BH, weight_CH.T, out=room)
    return torch.addmm(bias_C.to(hidden_BH.dtype), hidden_BH, weight_CH.T, out=room)


def _room(rows: int, classes: int, like: Tensor) -> Tensor:
    return like.new_empty(rows, WIDTH * -(-classes // WIDTH))[:, :classes]


def _products(operands: Operands, slope_BC: Tensor, upstream_B: Tensor, sums: Gradients) -> None:
    """Write the gradients, of slopes times what comes from above."""
    dtype = slope_BC.dtype
    if sums.hidden is not None:
        sums.hidden.copy_(product(slope_BC, operands.wide_weight(dtype)).mul_(upstream_B[:, None]))
    if sums.weight is not None:
        product(slope_BC.T, (operands.wide_hidden(dtype) * upstream_B[:, None]).to(dtype), out=sums.weight)
    if sums.bias is not None:
        sums.bias.copy_(product(upstream_B[None].to(dtype), slope_BC)[0])


def _in_parts(
    dtypes: tuple[torch.dtype, torch.dtype], operands: Operands, terms: Sequence[Term], wanted: Sequence[bool]
) -> tuple[Tensor, Gradients]:
    """Compute losses and gradients, some rows at a time."""
    count, classes = len(operands.hidden), len(operands.weight)
    at_once = rows_at_once(count, 2 * classes)
    sums = room_for_sums(operands, wanted, dtypes, whole=False)
    losses_B = torch.empty_like(terms[0].scale)
    weight_CH = operands.wide_weight(gradient_dtype(operands.hidden.dtype)) if any(wanted) else operands.weight
    for start in range(0, count, at_once):
        rows = slice(start, min(start + at_once, count))
        some = operands.some_rows(rows)
        losses_B[rows], slope_RC = _loss_and_slopes(some, terms[0].rows(rows))
        add_products(sums, slope_RC, weight_CH, some, rows)
    return losses_B, sums
