"""The fused linear layer and loss, some rows of all classes at a time.

The rows are not swept in smaller blocks: on a machine whose processors have other work, every parallel operation waits
for its slowest thread, and few large ones lose least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distilbeam.kernels.distillation.sweep import replace_by_gradient
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation.gradients import Gradients
from distilbeam.kernels.linear_distillation.products import times_transposed


def sweep_rows(
    hidden_BH: Tensor,
    weight_CH: Tensor,
    bias_C: Tensor | None,
    terms: Sequence[Term],
    sums: Gradients,
    rows_at_once: int,
) -> Tensor:
    """Compute the scaled losses and add up the gradients.

    Args:
      hidden_BH: inputs, in the dtype of the computation.
      weight_CH: weight, in the same dtype.
      bias_C: bias in the same dtype, or None.
      terms: of all rows.
      sums: room for the gradients wanted; written by the first rows, then added to.
      rows_at_once: rows whose logits are held together.

    Returns:
      The scaled losses, [B].
    """
    losses_B = torch.empty_like(terms[0].scale)
    for start in range(0, len(hidden_BH), rows_at_once):
        rows = slice(start, start + rows_at_once)
        operands = (hidden_BH[rows], weight_CH, bias_C)
        losses_B[rows] = _sweep_some_rows(*operands, [term.rows(rows) for term in terms], sums, rows)
    return losses_B


def _sweep_some_rows(
    hidden_RH: Tensor, weight_CH: Tensor, bias_C: Tensor | None, terms: Sequence[Term], sums: Gradients, rows: slice
) -> Tensor:
    """Compute the losses of some rows, whose logits are freed before the next ones' are made."""
    z_RC = times_transposed(hidden_RH, weight_CH, bias_C)
    losses_R = replace_by_gradient(z_RC, terms)
    first = rows.start == 0
    if sums.hidden is not None:
        sums.hidden[rows] = times_transposed(z_RC, weight_CH.T)
    if sums.weight is not None:
        _accumulate(sums.weight, z_RC.T, hidden_RH, first=first)
    if sums.bias is not None:
        _accumulate(sums.bias[:, None], z_RC.T, z_RC.new_ones(len(z_RC), 1), first=first)
    return losses_R


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    if first:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)
