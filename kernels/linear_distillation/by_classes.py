"""The fused linear layer and loss, all rows of some classes at a time; sparse labels only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation.buckets import solve
from distilbeam.kernels.linear_distillation.gradients import Gradients
from distilbeam.kernels.linear_distillation.operands import Operands

MOST_ROWS = 4096


class _Buckets:
    """The bucket logits of one term, gathered tile by tile; the rest's sum is kept relative to a running maximum."""

    def __init__(self, term: Term) -> None:
        assert term.targets.classes is not None
        self.term, self.classes_BK = term, term.targets.classes
        self.kept_BK = torch.zeros_like(term.targets.logprobs[:, : self.classes_BK.shape[1]])
        self.top_B1 = torch.full_like(self.kept_BK[:, :1], -torch.inf)
        self.sum_B1 = torch.zeros_like(self.top_B1)

    def add(self, z_BW: Tensor, start: int) -> None:
        """Take in the logits of the classes from `start`; `z_BW` ends in one column to spare and is overwritten."""
        column_BK, inside_BK = columns_of(self.classes_BK, start, z_BW.shape[1] - 1)
        self.kept_BK += torch.where(inside_BK, z_BW.gather(1, column_BK), 0)
        if self.term.targets.rest_temperature is None:
            return
        z_BW.scatter_(1, column_BK, -torch.inf)
        top_B1 = torch.maximum(self.top_B1, z_BW.amax(dim=1, keepdim=True))
        safe_B1 = top_B1.masked_fill(torch.isneginf(top_B1), 0)
        tau = self.term.targets.rest_temperature
        self.sum_B1 *= ((self.top_B1 - safe_B1) / tau).exp()
        self.sum_B1 += z_BW.sub_(safe_B1).div_(tau).exp_().sum(dim=1, keepdim=True)
        self.top_B1 = top_B1

    def solve(self) -> Tensor:
        """Solve the problem over the buckets and give the scaled losses, [B]."""
        whole = self.term.targets.rest_temperature is None
        self.solved = solve(self.kept_BK, None if whole else (self.top_B1, self.sum_B1), self.term)
        return self.solved.losses

    def spread(self, z_BW: Tensor, start: int) -> None:
        """Overwrite the logits of the classes from `start` by their gradient."""
        column_BK, _ = columns_of(self.classes_BK, start, z_BW.shape[1] - 1)
        if self.term.targets.rest_temperature is None:
            z_BW.zero_()
        else:
            z_BW.sub_(self.solved.top).div_(self.term.targets.rest_temperature).exp_().mul_(self.solved.slope)
        z_BW.scatter_(1, column_BK, 0).scatter_add_(1, column_BK, self.solved.kept)


def sweep_classes(operands: Operands, terms: Sequence[Term], sums: Gradients, elements: int) -> Tensor:
    """Compute the scaled losses and add up the gradients.

    Args:
      operands: inputs and bias in the dtype of the computation; of the weight, in any dtype, a tile at a time is brought
        to it.
      terms: of all rows, with sparse labels.
      sums: zeroed accumulators of the gradients wanted.
      elements: logits held together.

    Returns:
      The scaled losses, [B].
    """
    losses_B = torch.empty_like(terms[0].scale)
    for start in range(0, len(operands.hidden), MOST_ROWS):
        rows = slice(start, start + MOST_ROWS)
        buckets = [_Buckets(term.rows(rows)) for term in terms]
        some = operands._replace(hidden=operands.hidden[rows])
        losses_B[rows] = _sweep_some_rows(some, buckets, sums, rows, elements)
    return losses_B


def _sweep_some_rows(
    operands: Operands, buckets: Sequence[_Buckets], sums: Gradients, rows: slice, elements: int
) -> Tensor:
    for tile, _, z_RW in _tiles(operands, elements):
        for bucket in buckets[1:]:
            bucket.add(z_RW.clone(), tile.start)
        buckets[0].add(z_RW, tile.start)
    losses_R = sum(bucket.solve() for bucket in buckets)
    assert isinstance(losses_R, Tensor)
    if sums == (None, None, None):
        return losses_R
    for tile, weight_WH, z_RW in _tiles(operands, elements):
        copies = [z_RW.clone() for _ in buckets[1:]]
        buckets[0].spread(z_RW, tile.start)
        for bucket, copy_RW in zip(buckets[1:], copies, strict=True):
            bucket.spread(copy_RW, tile.start)
            z_RW += copy_RW
        gradient_RW = z_RW[:, :-1]
        if sums.hidden is not None:
            sums.hidden[rows].addmm_(gradient_RW, weight_WH)
        if sums.weight is not None:
            sums.weight[tile].addmm_(gradient_RW.T, operands.hidden)
        if sums.bias is not None:
            sums.bias[tile] += gradient_RW.sum(dim=0)
    return losses_R


def _tiles(operands: Operands, elements: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Give each tile of classes: where it is, its weight, and its logits with one column of -inf to spare."""
    hidden_RH, classes = operands.hidden, len(operands.weight)
    width = max(64, elements // max(1, len(hidden_RH)))
    buffer = hidden_RH.new_empty(len(hidden_RH), min(width, classes) + 1)
    for start in range(0, classes, width):
        tile = slice(start, min(start + width, classes))
        part = operands.part(tile)
        weight_WH = part.wide_weight(hidden_RH.dtype)
        z_RW = buffer[:, : len(weight_WH) + 1]
        torch.mm(hidden_RH, weight_WH.T, out=z_RW[:, :-1])
        if part.bias is not None:
            z_RW[:, :-1] += part.bias
        z_RW[:, -1] = -torch.inf
        yield tile, weight_WH, z_RW


def columns_of(classes_BK: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Find the kept classes in a tile.

    Args:
      classes_BK: the kept classes.
      start: first class of the tile.
      width: classes of the tile.

    Returns:
      Their columns, `width` for those outside, which is the column to spare; and which are inside.
    """
    inside_BK = (classes_BK >= start) & (classes_BK < start + width)
    return torch.where(inside_BK, classes_BK - start, width), inside_BK
