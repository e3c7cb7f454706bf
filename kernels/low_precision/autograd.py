"""The three products of a linear layer in 8 bits.

    forward   y  = (xq s_x) (Wq s_w)^T + b     s_x, s_w: one scale per row of x and of W
    input     dx = (dy s_w^T) Wq
    weight    dW = (dy s_x)^T xq

These are the derivatives of what the forward pass computes, its rounding taken for the identity: the scales move into
dy, so that the 8-bit values of the forward pass serve again. Kept for the backward pass are xq and s_x, a quarter of a
float32 input, and the quantised weight, which the layer has anyway. dy s is rounded to bfloat16, which holds every 8-bit
value exactly, or by rows to e4m3: with a scale per row the range of e5m2 is not needed, and its rounding is twice as
coarse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.devices import on_device_of
from distilbeam.kernels.low_precision.products import Product
from distilbeam.kernels.quantize.formats import QuantizedRows

Gradients = Literal["bf16", "fp8"]


class Recipe(NamedTuple):
    """How the products are made."""

    product: Product
    gradients: Gradients
    quantize: Callable[[Tensor], QuantizedRows]


class LinearFunction(torch.autograd.Function):
    """y = x W^T + b on quantised rows; `straight` and `weight` are there for their gradients."""

    @staticmethod
    def forward(
        straight_MK: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        x: QuantizedRows,
        w: QuantizedRows,
        recipe: Recipe,
    ) -> Tensor:
        """Compute y in the dtype of `straight`."""
        if not x.values.numel():
            start = straight_MK.new_zeros(len(x.values), len(weight_NK))
            return start if bias_N is None else start + bias_N.to(start.dtype)
        with on_device_of(x.values):
            return recipe.product(x.values, x.scale, w.values, w.scale, bias_N, straight_MK.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        """Keep the rows of the forward pass."""
        straight_MK, weight_NK, bias_N, x, w, ctx.recipe = inputs
        ctx.rows = QuantizedRows(x.values, x.scale), QuantizedRows(w.values, w.scale)
        ctx.dtypes = (straight_MK.dtype, weight_NK.dtype, None if bias_N is None else bias_N.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        """Compute the gradients that somebody wants."""
        x, w = ctx.rows
        dx_MK = dw_NK = db_N = None
        # a backward pass may be called inside of autocast
        with torch.autocast(dy_MN.device.type, enabled=False), on_device_of(dy_MN):
            if ctx.needs_input_grad[0]:
                dx_MK = _back(_slope(dy_MN, w.scale.T, ctx.recipe), w.values, ctx.recipe, ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                dw_NK = _back(_slope(dy_MN, x.scale, ctx.recipe).T, x.values, ctx.recipe, ctx.dtypes[1])
            if ctx.needs_input_grad[2]:
                db_N = dy_MN.sum(dim=0, dtype=torch.float32).to(ctx.dtypes[2])
        return dx_MK, dw_NK, db_N, None, None, None


def _slope(dy_MN: Tensor, scale: Tensor, recipe: Recipe) -> Tensor:
    """Move a scale into a gradient: float32 where it is quantised next, else rounded to bfloat16 as it is made."""
    if recipe.gradients == "fp8":
        return dy_MN * scale
    return torch.mul(dy_MN, scale, out=torch.empty(dy_MN.shape, dtype=torch.bfloat16, device=dy_MN.device))


def _back(slope_PQ: Tensor, values_QR: Tensor, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """Multiply a slope by 8-bit values."""
    if not values_QR.numel() or not slope_PQ.numel():
        return slope_PQ.new_zeros(len(slope_PQ), values_QR.shape[1], dtype=dtype)
    if recipe.gradients == "fp8":
        rows = recipe.quantize(slope_PQ)
        ones = rows.scale.new_ones(values_QR.shape[1], 1)
        return recipe.product(rows.values, rows.scale, values_QR.T, ones, None, dtype)
    if slope_PQ.is_cuda and dtype == torch.bfloat16:
        return slope_PQ @ values_QR.bfloat16()
    if slope_PQ.is_cuda:
        return torch.mm(slope_PQ, values_QR.bfloat16(), out_dtype=torch.float32).to(dtype)
    return (slope_PQ.float() @ values_QR.float()).to(dtype)
