"""The definition: the logits of a linear layer, then the distillation loss; gradients by autograd.

Cost: the logits and a few tensors of their size, [B, C] each, in float32 whatever the dtype of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distilbeam.kernels.distillation import reference
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation.operands import Layer


def total(
    layer: Layer,
    terms: Sequence[Term],
    reduced: bool,
    of_logits: Callable[[Tensor, Sequence[Term], bool], Tensor] = reference.total,
) -> Tensor:
    """Compute the scaled loss.

    Args:
      layer: the last layer; rows in fewer bits stand for the numbers that they hold.
      terms: from `make_terms`.
      reduced: whether to add the rows up.
      of_logits: computes the loss of the layer's logits.

    Returns:
      A scalar, or the rows' losses [B]; differentiable as often as `of_logits` is.
    """
    hidden_BH, weight_CH, bias_C = layer.widened()
    compute = terms[0].scale.dtype
    bias = None if bias_C is None else bias_C.to(compute)
    logits_BC = torch.nn.functional.linear(hidden_BH.to(compute), weight_CH.to(compute), bias)
    return of_logits(logits_BC, terms, reduced)
