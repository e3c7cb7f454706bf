"""Rows of numbers to 8 bits and back: `quantize_rowwise` and `dequantize_rowwise`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distilbeam.kernels.devices import on_device_of
from distilbeam.kernels.quantize import reference
from distilbeam.kernels.quantize.formats import FORMAT_OF, Format, QuantizedRows, stand_in
from distilbeam.kernels.resolve import Reasons, never, pallas_reasons, resolve, triton_reasons


def quantize_rowwise(x: Tensor, dtype: torch.dtype, *, implementation: str | None = None) -> QuantizedRows:
    """Quantise each row to 8 bits with a scale of its own.

    The largest number of a row just fits the format; what is larger than float32 holds saturates, NaN stays NaN (in int8
    through a scale of NaN). Every implementation gives the same bits.

    Args:
      x: floating [..., D].
      dtype: torch.int8, torch.float8_e4m3fn or torch.float8_e5m2.
      implementation: `reference`, `triton` (CUDA), `pallas` (TPU); None chooses.

    Returns:
      The rows: values [..., D] and scale, float32 [..., 1]. The gradient passes through `straight` as if nothing were
      rounded.

    Raises:
      ValueError: x is not floating or a scalar, or the dtype is none of the three.
      NotImplementedError: the implementation asked for cannot run here.

    Example:
      >>> import torch
      >>> from distilbeam.kernels import dequantize_rowwise, quantize_rowwise
      >>> rows = quantize_rowwise(torch.tensor([[127.0, -63.6], [1.0, 0.5]]), torch.int8)
      >>> rows.values.tolist()
      [[127, -64], [127, 64]]

    References:
      Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433 (the floating formats).
    """
    target = format_of(dtype)
    if not x.is_floating_point() or not x.ndim:
        raise ValueError(f"x must be floating [..., D], got {x.dtype} {list(x.shape)}")
    name = resolve("quantize_rowwise", implementation, backends(target, x))
    with on_device_of(x):
        return QuantizedRows(*backend(name)(x.detach(), target), stand_in(x))


def dequantize_rowwise(rows: QuantizedRows, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring quantised rows back.

    Args:
      rows: from `quantize_rowwise`.
      dtype: of the result; the product of value and scale is rounded to float32, then to it.

    Returns:
      [..., D]; its gradient is handed to what was quantised.

    Example:
      >>> import torch
      >>> from distilbeam.kernels import dequantize_rowwise, quantize_rowwise
      >>> dequantize_rowwise(quantize_rowwise(torch.tensor([[127.0, -63.6]]), torch.int8)).tolist()
      [[127.0, -64.0]]
    """
    if rows.straight is None:
        return reference.dequantize(rows.values, rows.scale).to(dtype)
    back: Tensor = _Dequantize.apply(rows.straight, rows.values, rows.scale, dtype)
    return back


def format_of(dtype: torch.dtype) -> Format:
    """Find the 8-bit format of a dtype, or refuse."""
    if dtype not in FORMAT_OF:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FORMAT_OF))}, got {dtype}")
    return FORMAT_OF[dtype]


def backends(target: Format, x: Tensor) -> dict[str, Reasons]:
    """Order the implementations of a quantisation: the fused kernel on a GPU."""
    triton: dict[str, Reasons] = {"triton": lambda: triton_refusals(target, x)}
    last: dict[str, Reasons] = {"reference": never, "pallas": pallas_reasons}
    return {**triton, **last} if x.is_cuda else {**last, **triton}


def backend(name: str) -> Callable[[Tensor, Format], tuple[Tensor, Tensor]]:
    """Give the function that quantises rows, importing what it needs."""
    if name == "triton":
        from distilbeam.kernels.quantize import triton_backend

        return triton_backend.quantize
    if name == "pallas":
        from distilbeam.kernels.quantize import pallas_backend

        return pallas_backend.quantize
    return reference.quantize


def triton_refusals(target: Format, *tensors: Tensor) -> list[str]:
    """List why Triton cannot make numbers of this format from these tensors."""
    reasons = triton_reasons(*tensors)
    if any(t.dtype == torch.float64 for t in tensors):
        reasons.append("it computes in float32, the input is float64")
    if target.dtype == torch.float8_e4m3fn and tensors[0].is_cuda:
        capability = torch.cuda.get_device_capability(tensors[0].device)
        if capability < (8, 9):
            reasons.append(f"the GPU has no float8_e4m3fn (compute capability {capability[0]}.{capability[1]})")
    return reasons


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(straight: Tensor, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG004
        return reference.dequantize(values, scale).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient.to(ctx.dtype), None, None, None
