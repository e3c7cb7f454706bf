"""The fused last layer and loss with Triton: logits are made in tiles, summed up, made again, and never all held.

A tile's gradient is stored in the dtype of the layer, in a buffer of some classes of all rows, from which the library's
matrix products bring it to hidden and weight with float32 sums. Imported when it is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from distilbeam.kernels.distillation.kept_bits import kept_bits
from distilbeam.kernels.distillation.targets import Targets
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation.buckets import Solved, solve
from distilbeam.kernels.linear_distillation.by_classes import columns_of
from distilbeam.kernels.linear_distillation.gradients import Gradients, Operands, apply_fused
from distilbeam.kernels.linear_distillation.triton_kernels import gradient_of_tile, kept_logits, rest_of_tiles

BUFFER_ELEMENTS = 1 << 26
PROGRAMS = 512  # enough to fill a GPU: classes are split until there are as many
TILE = {"BM": 64, "BN": 128, "BH": 64}
WARPS = 8


def total(hidden_BH: Tensor, weight_CH: Tensor, bias_C: Tensor | None, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss; see `chunked.total`."""
    return apply_fused(_run, Operands(hidden_BH.contiguous(), weight_CH.contiguous(), bias_C), terms, reduced)


def _run(operands: Operands, terms: Sequence[Term], wanted: Sequence[bool]) -> tuple[Tensor, Gradients]:
    sums = Gradients.zeros(operands, wanted, torch.float32)
    solved = [_first_pass(operands, term) for term in terms] if len(operands.hidden) else []
    losses_B = sum((one.losses for one in solved), torch.zeros_like(terms[0].scale))
    if not solved or not any(wanted):
        return losses_B, sums.like(operands)
    # beyond the part's classes, a column for the kept classes of other parts
    buffer_BW = operands.hidden.new_empty(len(operands.hidden), _width(operands) + 16)
    for part in _parts(operands):
        for number, (term, one) in enumerate(zip(terms, solved, strict=True)):
            _spread(operands, term.targets, one, buffer_BW, part, add=number > 0)
        _accumulate(operands, buffer_BW[:, : part.stop - part.start], part, sums)
    return losses_B, sums.like(operands)


def _first_pass(operands: Operands, term: Term) -> Solved:
    targets = term.targets
    assert targets.classes is not None
    tau = targets.rest_temperature
    rest_B1 = None if tau is None else _rest(operands, targets.classes, tau)[:, None]
    return solve(_kept(operands, targets.classes), rest_B1, term)


def _width(operands: Operands) -> int:
    return min(len(operands.weight), max(TILE["BN"], BUFFER_ELEMENTS // len(operands.hidden)))


def _parts(operands: Operands) -> list[slice]:
    """Cut the classes so that a part's logits fit the buffer."""
    classes, width = len(operands.weight), _width(operands)
    return [slice(first, min(first + width, classes)) for first in range(0, classes, width)]


def _spread(operands: Operands, targets: Targets, one: Solved, buffer_BW: Tensor, part: slice, *, add: bool) -> None:
    hidden, weight, bias = _part_of(operands, part)
    rows, size = len(hidden), len(weight)
    assert targets.classes is not None
    bits_BW = kept_bits(targets.classes, part.start, size)
    grid = (triton.cdiv(rows, TILE["BM"]), triton.cdiv(size, TILE["BN"]))
    gradient_of_tile[grid](
        hidden, weight, weight if bias is None else bias, bits_BW, one.rest, one.slope, buffer_BW, rows, size,
        hidden.shape[1], bits_BW.shape[1], buffer_BW.shape[1], targets.rest_temperature or 1.0,
        BIAS=bias is not None, EXACT=hidden.dtype == torch.float32, ADD=add, num_warps=WARPS, **TILE,
    )  # fmt: skip
    column_BK, _ = columns_of(targets.classes, part.start, size)
    kept_BK = one.kept.to(buffer_BW.dtype)
    if add:
        kept_BK = kept_BK + buffer_BW.gather(1, column_BK)
    buffer_BW.scatter_(1, column_BK, kept_BK)


def _part_of(operands: Operands, part: slice) -> Operands:
    return Operands(operands.hidden, operands.weight[part], None if operands.bias is None else operands.bias[part])


def _accumulate(operands: Operands, gradient_BW: Tensor, part: slice, sums: Gradients) -> None:
    if sums.hidden is not None:
        sums.hidden.add_(product(gradient_BW, operands.weight[part]))
    if sums.weight is not None:
        sums.weight[part] = product(gradient_BW.T, operands.hidden)
    if sums.bias is not None:
        sums.bias[part] = gradient_BW.sum(dim=0, dtype=torch.float32)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices of the same dtype into float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _kept(operands: Operands, classes_BK: Tensor) -> Tensor:
    hidden, weight, bias = operands
    rows, width = classes_BK.shape
    logits_BK = torch.empty(rows, width, device=hidden.device)
    kept_logits[(rows,)](
        hidden, weight, weight if bias is None else bias, classes_BK.to(torch.int32), logits_BK, hidden.shape[1],
        K=width, KP=triton.next_power_of_2(width), BH=64, BIAS=bias is not None,
    )  # fmt: skip
    return logits_BK


def _rest(operands: Operands, classes_BK: Tensor, tau: float) -> Tensor:
    levels = [_rest_of_part(operands, classes_BK, part, tau) for part in _parts(operands)]
    return tau * torch.logsumexp(torch.cat(levels) / tau, dim=0)


def _rest_of_part(operands: Operands, classes_BK: Tensor, part: slice, tau: float) -> Tensor:
    hidden, weight, bias = _part_of(operands, part)
    rows, size = len(hidden), len(weight)
    bits_BW = kept_bits(classes_BK, part.start, size)
    blocks, tiles = triton.cdiv(rows, TILE["BM"]), triton.cdiv(size, TILE["BN"])
    split = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // blocks)))
    parts = triton.cdiv(tiles, split)
    tops, totals = torch.empty(2, parts, rows, device=hidden.device).unbind()
    rest_of_tiles[(blocks, parts)](
        hidden, weight, weight if bias is None else bias, bits_BW, tops, totals, rows, size, hidden.shape[1],
        bits_BW.shape[1], tau, SPLIT=split, BIAS=bias is not None, EXACT=hidden.dtype == torch.float32,
        num_warps=WARPS, **TILE,
    )  # fmt: skip
    return tops + tau * totals.log()
