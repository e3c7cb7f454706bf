"""Value and gradients without ever holding the logits of the whole batch, on any device.

Two orders of the same work, chosen by the number of classes:

* by rows: the logits of some rows fill a buffer, are overwritten by their gradient, and two products bring it to hidden
  and weight. Three products of 2 B H C operations in all.
* by classes, when too few rows of all classes fit the buffer to keep a product busy, or when the weight must be brought
  to float32: a first pass over tiles of classes finds every row's buckets, a second one recomputes each tile and
  overwrites it by its gradient. Four products; besides the gradients only the buffer and [B, k] tensors are held.

Memory: the gradients, and a buffer of 16 MiB in float32, of more than 65,536 classes of up to 32 MiB.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation.by_classes import sweep_classes
from distilbeam.kernels.linear_distillation.by_rows import sweep_rows
from distilbeam.kernels.linear_distillation.gradients import Gradients, apply_fused
from distilbeam.kernels.linear_distillation.operands import Layer, Operands

BUFFER_ELEMENTS = 1 << 22
ROW_STEP = 64  # equal blocks of rows; fewer cost more time than the second half of a buffer of 32 MiB is worth
FEWEST_ROWS = 32  # of 128,256 classes and 256 features 1.74 s, by classes 2.07 s, 64 rows 1.38 s (EPYC, one thread)


def total(layer: Layer, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss.

    Args:
      layer: the last layer.
      terms: from `make_terms`.
      reduced: whether to add the rows up.

    Returns:
      A scalar, or the rows' losses [B]; differentiable once.
    """
    return apply_fused(_run, layer, terms, reduced)


def _run(operands: Operands, terms: Sequence[Term], wanted: Sequence[bool]) -> tuple[Tensor, Gradients]:
    compute, rows = terms[0].scale.dtype, rows_at_once(len(operands.weight))
    wide = operands._replace(hidden=operands.wide_hidden(compute), hidden_scale=None)
    if wide.bias is not None:
        wide = wide._replace(bias=wide.bias.to(compute))
    dense = any(term.targets.classes is None for term in terms)
    exact = operands.hidden.dtype == operands.weight.dtype == compute
    if len(wide.hidden) and (dense or (exact and rows >= min(FEWEST_ROWS, len(wide.hidden)))):
        sums = Gradients.empty(operands, wanted, compute)
        return sweep_rows(wide.hidden, wide.wide_weight(compute), wide.bias, terms, sums, max(1, rows)), sums
    sums = Gradients.zeros(operands, wanted, compute)
    return sweep_classes(wide, terms, sums, BUFFER_ELEMENTS // 4), sums


def rows_at_once(classes: int) -> int:
    """Say of how many rows the logits of all classes are held: what fits the buffer, or up to ROW_STEP in two of its size."""
    rows = BUFFER_ELEMENTS // max(1, classes)
    return rows - rows % ROW_STEP if rows > ROW_STEP else min(ROW_STEP, 2 * BUFFER_ELEMENTS // max(1, classes))
