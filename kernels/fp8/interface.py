"""A linear layer whose three products run in 8-bit floating point: `fp8_linear`.

    forward     y  = x W^T      x and W in e4m3, one scale per row (or per tensor)
    input       dx = dy W       dy in e5m2, W in e4m3
    weight      dW = dy^T x     dy in e5m2, x in e4m3

Each operand is scaled anew along the dimension that is summed over, so a scale never varies inside a dot product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.fp8 import products
from distilbeam.kernels.fp8.scaling import BACKWARD, FORWARD, Scaling, to_fp8
from distilbeam.kernels.resolve import Reasons, never, no_kernel, resolve


def fp8_linear(
    input: Tensor,  # noqa: A002 - the name of torch.nn.functional.linear
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: Scaling = "row",
    implementation: str | None = None,
) -> Tensor:
    """Apply a linear layer with 8-bit floating-point products and float32 accumulation.

    Args:
      input: floating [..., K].
      weight: floating [N, K], kept in its own precision by the caller.
      bias: floating [N], added in float32; None for 0.
      scaling: `row`: a scale per row of each operand; `tensor`: one per operand, cheaper and coarser.
      implementation: `reference` (any device), `scaled_mm` (CUDA, compute capability 8.9); None chooses.

    Returns:
      The outputs, in the dtype of `input`, [..., N]; differentiable once.

    Raises:
      ValueError: sizes disagree or `scaling` is unknown.
      NotImplementedError: the implementation asked for cannot run here.

    Example:
      >>> import torch
      >>> from distilbeam.kernels import fp8_linear
      >>> fp8_linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 0.5]]))
      tensor([[5.]])

    References:
      Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433.
    """
    if scaling not in ("row", "tensor"):
        raise ValueError(f"scaling must be 'row' or 'tensor', got {scaling!r}")
    if weight.ndim != 2 or input.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight must be [outputs, {input.shape[-1]}] to fit input, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have one value per output, [{len(weight)}], got {list(bias.shape)}")
    backends: dict[str, Reasons] = {
        "scaled_mm": lambda: products.scaled_mm_reasons(input, weight),
        "reference": never,
        **no_kernel("triton", "pallas"),
    }
    name = resolve("fp8_linear", implementation, backends)
    product = {"scaled_mm": products.scaled_mm, "reference": products.reference}[name]
    rows_MN: Tensor = _Fp8Linear.apply(input.reshape(-1, input.shape[-1]), weight, scaling, product)
    total = rows_MN.float() if bias is None else rows_MN.float() + bias.float()
    return total.reshape(*input.shape[:-1], len(weight)).to(input.dtype)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, scaling: Scaling, product: products.Product) -> Tensor:
        ctx.save_for_backward(x_MK, weight_NK)
        ctx.scaling, ctx.product = scaling, product
        if not x_MK.numel():
            return x_MK.new_zeros(len(x_MK), len(weight_NK))
        return product(*to_fp8(x_MK, FORWARD, scaling), *to_fp8(weight_NK, FORWARD, scaling))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_MK, weight_NK = ctx.saved_tensors
        if not x_MK.numel():
            return torch.zeros_like(x_MK), torch.zeros_like(weight_NK), None, None
        dx_MK = dw_NK = None
        if ctx.needs_input_grad[0]:
            dx_MK = ctx.product(*to_fp8(dy_MN, BACKWARD, ctx.scaling), *to_fp8(weight_NK.T, FORWARD, ctx.scaling))
            dx_MK = dx_MK.to(x_MK.dtype)
        if ctx.needs_input_grad[1]:
            dw_NK = ctx.product(*to_fp8(dy_MN.T, BACKWARD, ctx.scaling), *to_fp8(x_MK.T, FORWARD, ctx.scaling))
            dw_NK = dw_NK.to(weight_NK.dtype)
        return dx_MK, dw_NK, None, None
