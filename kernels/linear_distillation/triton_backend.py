"""The fused last layer and loss with Triton, in one of two orders; imported when it is chosen.

* by rows: the library's product makes the float32 logits of some rows, whose gradient takes their place in the dtype of
  the layer, and two products bring it to hidden and weight. Three products of 2 B H C operations in all, at the library's
  speed.
* by classes, for 8-bit layers and for few features, where moving the logits takes longer than making them again: logits
  are made in tiles, summed up and made again, and never held. A tile's gradient is stored in the dtype of the layer, in a
  buffer of some classes of all rows, from which the library's products bring it on. Four products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from distilbeam.kernels.distillation import triton_backend as of_logits
from distilbeam.kernels.distillation.targets import Targets
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation.buckets import Solved, solve
from distilbeam.kernels.linear_distillation.by_classes import columns_of
from distilbeam.kernels.linear_distillation.gradients import Gradients, apply_fused
from distilbeam.kernels.linear_distillation.operands import Layer, Operands
from distilbeam.kernels.linear_distillation.triton_kernels import gradient_of_tile, kept_logits, rest_of_tiles
from distilbeam.kernels.sizes import cdiv, next_power_of_2

ROWS_BYTES = 1 << 30  # of the logits that are held together by rows
BUFFER_ELEMENTS = 1 << 26  # numbers of the gradient that are held together by classes
PROGRAMS = 512  # enough to fill a GPU: classes are split until there are as many
TILE = {"BM": 64, "BN": 128, "BH": 64}
WARPS, STAGES = 8, 3
FEWEST_FEATURES = 512  # by rows: below, 12 bytes more a logit cost more than one more product (4.2 TB/s, 430 TFLOP/s)


def total(layer: Layer, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss; see `chunked.total`."""
    operands = layer.operands
    if operands.hidden_scale is None and operands.hidden.shape[1] >= FEWEST_FEATURES:
        of_hidden, of_weight, _ = layer.leaves
        return apply_fused(partial(_by_rows, (of_hidden.dtype, of_weight.dtype)), layer, terms, reduced)
    return apply_fused(_by_classes, layer, terms, reduced)


def _by_rows(
    dtypes: tuple[torch.dtype, torch.dtype], operands: Operands, terms: Sequence[Term], wanted: Sequence[bool]
) -> tuple[Tensor, Gradients]:
    """Compute losses and gradients, those of hidden and weight in dtypes that may be wider than the products'."""
    (count, classes), dtype = (len(operands.hidden), len(operands.weight)), operands.hidden.dtype
    at_once = rows_at_once(count, classes, len(terms))
    # a weight's gradient that is made in one piece needs no sum in float32 beside it
    kinds = (dtypes[0], dtypes[1] if at_once == count else torch.float32, torch.float32)
    sums = Gradients(
        *(
            x.new_empty(x.shape, dtype=kind) if want and x is not None else None
            for x, kind, want in zip(operands[:3], kinds, wanted, strict=True)
        )
    )
    losses_B = torch.empty_like(terms[0].scale)
    if not count:
        return losses_B, Gradients.zeros(operands, wanted, torch.float32)
    logits_RC = operands.hidden.new_empty(at_once, classes, dtype=torch.float32)
    apart_RC = operands.hidden.new_empty(at_once, classes) if len(terms) > 1 else None
    for start in range(0, count, at_once):
        rows = slice(start, min(start + at_once, count))
        hidden_RH = operands.hidden[rows]
        z_RC = product(hidden_RH, operands.weight.T, out=logits_RC[: len(hidden_RH)])
        slope_RC = z_RC.view(dtype)[:, :classes] if apart_RC is None else apart_RC[: len(hidden_RH)]
        for number, whole in enumerate(terms):
            term, add = whole.rows(rows), number > 0
            if any(wanted):
                of_logits.launch(z_RC, term, losses_B[rows], slope_RC, add=add, bias_C=operands.bias)
            else:
                of_logits.solve(z_RC, term, of_logits.Kept.of(term), losses_B[rows], add=add, bias_C=operands.bias)
        if sums.hidden is not None:
            product(slope_RC, operands.weight, out=sums.hidden[rows])
        if sums.weight is not None:
            _add_product(sums.weight, slope_RC.T, hidden_RH, first=start == 0)
        if sums.bias is not None:
            of_rows = slope_RC.sum(dim=0, dtype=torch.float32)
            sums.bias.copy_(of_rows if start == 0 else sums.bias + of_rows)
    return losses_B, sums


def rows_at_once(count: int, classes: int, terms: int) -> int:
    """Say of how many of `count` rows all logits are held together: equal parts of the fewest that fit."""
    bytes_of_row = classes * (4 if terms == 1 else 8)
    parts = cdiv(count, max(1, ROWS_BYTES // bytes_of_row)) if count else 1
    return min(count, 16 * cdiv(cdiv(count, parts), 16))


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    if first:
        product(a, b, out=total)
    elif a.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _by_classes(operands: Operands, terms: Sequence[Term], wanted: Sequence[bool]) -> tuple[Tensor, Gradients]:
    operands = operands._replace(hidden=operands.hidden.contiguous(), weight=operands.weight.contiguous())
    sums = Gradients.zeros(operands, wanted, torch.float32)
    solved = [_first_pass(operands, term) for term in terms] if len(operands.hidden) else []
    losses_B = sum((one.losses for one in solved), torch.zeros_like(terms[0].scale))
    if not solved or not any(wanted):
        return losses_B, sums
    # beyond the part's classes, a column for the kept classes of other parts
    shape = len(operands.hidden), _width(operands) + 16
    buffer_BW = torch.empty(shape, dtype=gradient_dtype(operands.hidden.dtype), device=operands.hidden.device)
    for classes in _parts(operands):
        part = operands.part(classes)
        for number, (term, one) in enumerate(zip(terms, solved, strict=True)):
            _spread(part, term.targets, one, buffer_BW, classes.start, add=number > 0)
        _accumulate(part, buffer_BW[:, : len(part.weight)], classes, sums)
    return losses_B, sums


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Choose what the logits' gradient is rounded to before it is multiplied: what the layer is in, bfloat16 for 8 bits."""
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def _first_pass(operands: Operands, term: Term) -> Solved:
    targets = term.targets
    assert targets.classes is not None
    tau = targets.rest_temperature
    rest = None if tau is None else _rest(operands, targets.classes, tau)
    return solve(_kept(operands, targets.classes), rest, term)


def _width(operands: Operands) -> int:
    return min(len(operands.weight), max(TILE["BN"], BUFFER_ELEMENTS // len(operands.hidden)))


def _parts(operands: Operands) -> list[slice]:
    """Cut the classes so that a part's logits fit the buffer."""
    classes, width = len(operands.weight), _width(operands)
    return [slice(first, min(first + width, classes)) for first in range(0, classes, width)]


def _pointers(operands: Operands) -> tuple[Tensor, ...]:
    """Give the operands as the kernels take them; what is missing is not looked at there."""
    hidden, weight, bias, hidden_scale, weight_scale = operands
    return (
        hidden,
        weight,
        hidden if hidden_scale is None else hidden_scale.contiguous(),
        weight if weight_scale is None else weight_scale.contiguous(),
        weight if bias is None else bias,
    )


def _flags(operands: Operands) -> dict[str, bool]:
    dtype = operands.hidden.dtype
    return {
        "BIAS": operands.bias is not None,
        "SCALED": operands.hidden_scale is not None,
        "WHOLE": dtype == torch.int8,
        "EXACT": dtype == torch.float32,
    }


def _spread(part: Operands, targets: Targets, one: Solved, buffer_BW: Tensor, first: int, *, add: bool) -> None:
    rows, size = len(part.hidden), len(part.weight)
    assert targets.classes is not None
    bits_BW = of_logits.kept_bits(targets.classes, first, size)
    grid = (cdiv(rows, TILE["BM"]), cdiv(size, TILE["BN"]))
    gradient_of_tile[grid](
        *_pointers(part), bits_BW, one.top, one.slope, buffer_BW, rows, size, part.hidden.shape[1], bits_BW.shape[1],
        buffer_BW.shape[1], targets.rest_temperature or 1.0, ADD=add, num_warps=WARPS, num_stages=STAGES, **_flags(part), **TILE,
    )  # fmt: skip
    column_BK, _ = columns_of(targets.classes, first, size)
    if not add:
        buffer_BW.scatter_(1, column_BK, 0)
    buffer_BW.scatter_add_(1, column_BK, one.kept.to(buffer_BW.dtype))


def _accumulate(part: Operands, gradient_BW: Tensor, classes: slice, sums: Gradients) -> None:
    if sums.hidden is not None:
        sums.hidden.add_(product(gradient_BW, part.wide_weight(gradient_BW.dtype)))
    if sums.weight is not None:
        sums.weight[classes] = product(gradient_BW.T, part.wide_hidden(gradient_BW.dtype))
    if sums.bias is not None:
        sums.bias[classes] = gradient_BW.sum(dim=0, dtype=torch.float32)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply matrices of the same dtype with float32 sums, into float32 or the dtype of `out`."""
    dtype = torch.float32 if out is None else out.dtype
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype) if out is None else torch.mm(a, b, out_dtype=dtype, out=out)
    if out is not None:
        return torch.mm(a, b, out=out) if a.dtype == dtype else out.copy_(a.to(dtype) @ b.to(dtype))
    return a.float() @ b.float()


def _kept(operands: Operands, classes_BK: Tensor) -> Tensor:
    rows, width = classes_BK.shape
    logits_BK = torch.empty(rows, width, device=operands.hidden.device)
    flags = {name: flag for name, flag in _flags(operands).items() if name in ("BIAS", "SCALED")}
    kept_logits[(rows,)](
        *_pointers(operands), classes_BK.to(torch.int32), logits_BK, operands.hidden.shape[1],
        K=width, KP=next_power_of_2(width), BH=64, **flags,
    )  # fmt: skip
    return logits_BK


def _rest(operands: Operands, classes_BK: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Find the largest logit of the rest and the sum of exponentials relative to it, [B, 1] each."""
    found = [_rest_of_part(operands.part(part), classes_BK, part.start, tau) for part in _parts(operands)]
    tops, totals = (torch.cat(parts) for parts in zip(*found, strict=True))
    best = tops.amax(dim=0)
    factors = ((tops - best.masked_fill(torch.isneginf(best), 0)) / tau).exp()
    return best[:, None], (totals * factors).sum(dim=0)[:, None]


def _rest_of_part(part: Operands, classes_BK: Tensor, first: int, tau: float) -> tuple[Tensor, Tensor]:
    rows, size = len(part.hidden), len(part.weight)
    bits_BW = of_logits.kept_bits(classes_BK, first, size)
    blocks, tiles = cdiv(rows, TILE["BM"]), cdiv(size, TILE["BN"])
    split = cdiv(tiles, max(1, min(tiles, PROGRAMS // blocks)))
    parts = cdiv(tiles, split)
    tops, totals = torch.empty(2, parts, rows, device=part.hidden.device).unbind()
    rest_of_tiles[(blocks, parts)](
        *_pointers(part), bits_BW, tops, totals, rows, size, part.hidden.shape[1], bits_BW.shape[1], tau,
        SPLIT=split, num_warps=WARPS, num_stages=STAGES, **_flags(part), **TILE,
    )  # fmt: skip
    return tops, totals
