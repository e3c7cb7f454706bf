"""The fused last layer and loss with Triton, some rows of all classes at a time; imported when it is chosen.

The library's product makes the float32 logits of some rows, of int8 rows our own (`low_precision/triton_kernels.py`), whose
gradient takes their place in the dtype of the layer, bfloat16 for 8 bits, and two products bring it to hidden and weight.
Three products of 2 B H C operations in all, at the library's speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from distilbeam.kernels.distillation import triton_backend as of_logits
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation.gradients import Gradients, apply_fused
from distilbeam.kernels.linear_distillation.operands import Layer, Operands
from distilbeam.kernels.sizes import cdiv

ROWS_BYTES = 1 << 30  # of the logits that are held together
Dtypes = tuple[torch.dtype, torch.dtype]


def total(layer: Layer, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss; see `chunked.total`."""
    of_hidden, of_weight, _ = layer.leaves
    return apply_fused(partial(_by_rows, (of_hidden.dtype, of_weight.dtype)), layer, terms, reduced)


def _by_rows(
    dtypes: Dtypes, operands: Operands, terms: Sequence[Term], wanted: Sequence[bool]
) -> tuple[Tensor, Gradients]:
    """Compute losses and gradients, those of hidden and weight in dtypes that may be wider than the products'."""
    count, classes = len(operands.hidden), len(operands.weight)
    if not count:
        return torch.empty_like(terms[0].scale), Gradients.zeros(operands, wanted, torch.float32)
    at_once = rows_at_once(count, classes * (4 if len(terms) == 1 else 8))
    sums = room_for_sums(operands, wanted, dtypes, whole=at_once == count)
    dtype = gradient_dtype(operands.hidden.dtype)
    losses_B = torch.empty_like(terms[0].scale)
    logits_RC = losses_B.new_empty(at_once, classes)
    apart_RC = losses_B.new_empty(at_once, classes, dtype=dtype) if len(terms) > 1 else None
    weight_CH = operands.wide_weight(dtype) if any(wanted) else operands.weight
    for start in range(0, count, at_once):
        rows = slice(start, min(start + at_once, count))
        some = operands.some_rows(rows)
        z_RC = _logits(some, logits_RC[: len(some.hidden)])
        slope_RC = z_RC.view(dtype)[:, :classes] if apart_RC is None else apart_RC[: len(z_RC)]
        for number, whole in enumerate(terms):
            term, add = whole.rows(rows), number > 0
            if any(wanted):
                of_logits.launch(z_RC, term, losses_B[rows], slope_RC, add=add, bias_C=operands.bias)
            else:
                of_logits.solve(z_RC, term, of_logits.Kept.of(term), losses_B[rows], add=add, bias_C=operands.bias)
        add_products(sums, slope_RC, weight_CH, some, rows)
    return losses_B, sums


def _logits(some: Operands, room_RC: Tensor) -> Tensor:
    """Multiply, in `room_RC` where the library does."""
    if some.hidden_scale is None or some.weight_scale is None:
        return product(some.hidden, some.weight.T, out=room_RC)
    from distilbeam.kernels.low_precision.triton_backend import product as of_whole_numbers

    return of_whole_numbers(some.hidden, some.hidden_scale, some.weight, some.weight_scale, None, torch.float32)


def rows_at_once(count: int, bytes_of_row: int) -> int:
    """Say of how many of `count` rows all logits are held together: equal parts of the fewest that fit."""
    parts = cdiv(count, max(1, ROWS_BYTES // bytes_of_row)) if count else 1
    return min(count, 16 * cdiv(cdiv(count, parts), 16))


def room_for_sums(operands: Operands, wanted: Sequence[bool], dtypes: Dtypes, *, whole: bool) -> Gradients:
    """Make room for the gradients; a weight's that is made in one piece (`whole`) needs no sum in float32."""
    kinds = (dtypes[0], dtypes[1] if whole else torch.float32, torch.float32)
    return Gradients(
        *(
            torch.empty(x.shape, dtype=kind, device=x.device) if want and x is not None else None
            for x, kind, want in zip(operands[:3], kinds, wanted, strict=True)
        )
    )


def add_products(sums: Gradients, slope_RC: Tensor, weight_CH: Tensor, some: Operands, rows: slice) -> None:
    """Bring the gradient by some rows' logits to hidden, weight and bias, which the first rows write."""
    first = rows.start == 0
    if sums.hidden is not None:
        product(slope_RC, weight_CH, out=sums.hidden[rows])
    if sums.weight is not None:
        _add_product(sums.weight, slope_RC.T, some.wide_hidden(slope_RC.dtype), first=first)
    if sums.bias is not None:
        of_rows = slope_RC.sum(dim=0, dtype=torch.float32)
        sums.bias.copy_(of_rows if first else sums.bias + of_rows)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Choose what the logits' gradient is rounded to before it is multiplied: what the layer is in, bfloat16 for 8 bits."""
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    if first:
        product(a, b, out=total)
    elif a.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply matrices of the same dtype with float32 sums, into float32 or the dtype of `out`."""
    dtype = torch.float32 if out is None else out.dtype
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype) if out is None else torch.mm(a, b, out_dtype=dtype, out=out)
    if out is not None:
        return torch.mm(a, b, out=out) if a.dtype == dtype else out.copy_(a.to(dtype) @ b.to(dtype))
    return a.float() @ b.float()
