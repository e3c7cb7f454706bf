"""A last layer in fewer bits, computed exactly: float64 on the numbers that the rounded layer holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distilbeam.kernels import linear_distill_loss
from distilbeam.kernels.labels import Labels
from distilbeam.kernels.quantize import reference
from distilbeam.kernels.quantize.formats import FORMATS


def rounded(x: Tensor, precision: str) -> Tensor:
    """Give the numbers that rows in fewer bits hold, in float64."""
    if precision == "bf16":
        return x.detach().bfloat16().double()
    return reference.dequantize(*reference.quantize(x.detach(), FORMATS[precision])).double()


def exact(
    operands: Sequence[Tensor], precision: str, labels: Labels, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Compute the loss of the rounded layer and its gradients by the definition.

    Returns:
      The loss; the gradients of hidden, weight and bias; and, for each, the sum of the absolute products that it adds up.
    """
    leaves = [*(rounded(x, precision) for x in operands[:2]), operands[2].detach().double()]
    logits = torch.nn.functional.linear(*leaves).requires_grad_()
    identity = torch.eye(logits.shape[1], dtype=torch.float64)
    # the layer of the identity is the loss of given logits, with the options of a layer's
    loss = linear_distill_loss(logits, identity, None, labels, implementation="reference", **options)
    (slope,) = torch.autograd.grad(loss, logits, None if upstream is None else upstream.double())
    hidden, weight, _ = leaves
    products = slope @ weight, slope.T @ hidden, slope.sum(dim=0)
    sizes = slope.abs() @ weight.abs(), slope.abs().T @ hidden.abs(), slope.abs().sum(dim=0)
    return loss.detach(), list(products), list(sizes)
