"""Value and gradients without ever holding the logits of the whole batch, on any device.

Two orders of the same work, chosen by the number of classes:

* by rows: the logits of some rows fill a buffer, are overwritten by their gradient, and two products bring it to hidden
  and weight. Three products of 2 B H C operations in all.
* by classes, when too few rows of all classes fit the buffer to keep a product busy, or when the weight must be brought
  to float32: a first pass over tiles of classes finds every row's buckets, a second one recomputes each tile and
  overwrites it by its gradient. Four products; besides the gradients only the buffer and [B, k] tensors are held.

Memory: the gradients, and a buffer of at most 32 MiB in float32, whatever the number of classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation.by_classes import sweep_classes
from distilbeam.kernels.linear_distillation.by_rows import sweep_rows
from distilbeam.kernels.linear_distillation.gradients import Gradients, Operands, apply_fused

BUFFER_ELEMENTS = 1 << 23
ROW_STEP = 64  # equal blocks of rows; in paired runs no faster and no slower than a buffer filled to the last row
FEWEST_ROWS = 96  # below this a product by rows wastes more than the fourth product by classes costs


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
    return apply_fused(_run, Operands(hidden_BH, weight_CH, bias_C), terms, reduced)


def _run(operands: Operands, terms: Sequence[Term], wanted: Sequence[bool]) -> tuple[Tensor, Gradients]:
    compute = terms[0].scale.dtype
    hidden_BH, weight_CH, bias_C = operands
    rows = BUFFER_ELEMENTS // max(1, len(weight_CH))
    rows -= rows % ROW_STEP if rows > ROW_STEP else 0
    dense = any(term.targets.classes is None for term in terms)
    exact = hidden_BH.dtype == weight_CH.dtype == compute
    bias = None if bias_C is None else bias_C.to(compute)
    if len(hidden_BH) and (dense or (exact and rows >= min(FEWEST_ROWS, len(hidden_BH)))):
        sums = Gradients.empty(operands, wanted, compute)
        losses_B = sweep_rows(hidden_BH.to(compute), weight_CH.to(compute), bias, terms, sums, max(1, rows))
    else:
        sums = Gradients.zeros(operands, wanted, compute)
        losses_B = sweep_classes(hidden_BH.to(compute), weight_CH, bias, terms, sums, BUFFER_ELEMENTS // 4)
    return losses_B, sums.like(operands)
