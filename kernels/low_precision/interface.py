"""Linear layers whose products run in 8 bits: `fp8_linear` and `int8_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

from distilbeam.kernels.compiling import not_compiled, not_narrowed
from distilbeam.kernels.devices import on_device_of
from distilbeam.kernels.low_precision.autograd import Gradients, LinearFunction, Recipe
from distilbeam.kernels.low_precision.products import named
from distilbeam.kernels.low_precision.refusals import Call, backends
from distilbeam.kernels.low_precision.weights import WeightCache
from distilbeam.kernels.quantize.formats import FORMATS, QuantizedRows
from distilbeam.kernels.quantize.interface import quantize_rowwise
from distilbeam.kernels.resolve import resolve


def fp8_linear(
    input: Tensor | QuantizedRows,  # noqa: A002 - the name of torch.nn.functional.linear
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gradients: Gradients = "fp8",
    cache: WeightCache | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Apply a linear layer with e4m3 products, one scale per row of input and weight, and float32 sums.

    Args:
      input: floating [..., K], or rows quantised to float8_e4m3fn by the operation before.
      weight: floating [N, K], kept in its own precision by the caller.
      bias: floating [N], added in float32; None for 0.
      gradients: of what the two products of the backward pass are made: `fp8`, the gradient in e4m3 with a scale per row,
        or `bf16`.
      cache: keeps the quantised weight from call to call; None quantises it now.
      implementation: `reference` (any device), `scaled_mm` (CUDA, compute capability 8.9; results are rounded to bfloat16),
        `triton` (the same product on operands that Triton lays out for it, all in fp8; not measured); None chooses.

    Returns:
      The outputs, [..., N], in the dtype of the input, float32 for quantised rows without a gradient; differentiable
      once, the rounding to 8 bits taken for the identity.

    Raises:
      ValueError: sizes disagree, the rows have another format, or `gradients` is unknown.
      NotImplementedError: the implementation asked for cannot run here.

    Example:
      >>> import torch
      >>> from distilbeam.kernels import fp8_linear
      >>> fp8_linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 0.5]]))
      tensor([[5.]])

    References:
      Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433.
    """
    y: Tensor = _linear("fp8", input, weight, bias, gradients, cache, implementation)
    return y


def int8_linear(
    input: Tensor | QuantizedRows,  # noqa: A002 - the name of torch.nn.functional.linear
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    cache: WeightCache | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Apply a linear layer with int8 products, one scale per row of input and weight, and exact int32 sums.

    The products of the backward pass are made of bfloat16.

    Args:
      input: floating [..., K], or rows quantised to int8 by the operation before.
      weight: floating [N, K], kept in its own precision by the caller.
      bias: floating [N], added in float32; None for 0.
      cache: keeps the quantised weight from call to call; None quantises it now.
      implementation: `reference` (any device), `triton` (CUDA), `int_mm` (CUDA); None chooses.

    Returns:
      The outputs, as for `fp8_linear`.

    Raises:
      ValueError: sizes disagree, or the rows have another format.
      NotImplementedError: the implementation asked for cannot run here.

    Example:
      >>> import torch
      >>> from distilbeam.kernels import int8_linear
      >>> int8_linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 4.0]])).round(decimals=1)
      tensor([[12.]])

    References:
      Jacob et al., Quantization and Training of Neural Networks, arXiv:1712.05877.
    """
    y: Tensor = _linear("int8", input, weight, bias, "bf16", cache, implementation)
    return y


def chosen(form: str, weight: Tensor, gradients: Gradients, rows: int = 64) -> str:
    """Name the implementation that a layer's products have where nobody asks for one.

    Args:
      form: `fp8` or `int8`.
      weight: floating [N, K].
      gradients: see `fp8_linear`.
      rows: of its bfloat16 input.
    """
    given = torch.empty(1, weight.shape[1], dtype=torch.bfloat16, device=weight.device).expand(rows, -1)
    return resolve(f"{form}_linear", None, backends(Call(form, given, weight, torch.bfloat16, gradients)))


@not_compiled  # whether a cached weight is still valid is no constant to compile in
def _linear(
    form: str,
    rows: Tensor | QuantizedRows,
    weight: Tensor,
    bias: Tensor | None,
    gradients: Gradients,
    cache: WeightCache | None,
    implementation: str | None,
) -> Tensor:
    _check(form, rows, weight, bias, gradients)
    given = rows.values if isinstance(rows, QuantizedRows) else rows
    call = Call(form, given, weight, _dtype(rows), gradients)
    name = resolve(f"{form}_linear", implementation, backends(call))
    quantizing = name if name == "triton" else None

    def quantize(x: Tensor) -> QuantizedRows:
        return quantize_rowwise(x, FORMATS[form].dtype, implementation=quantizing)

    if (form, name) == ("fp8", "triton"):
        with not_narrowed(given.device.type):
            return _all_in_fp8(rows, weight, bias, cache, call.dtype)
    with not_narrowed(given.device.type):
        x = rows.flattened() if isinstance(rows, QuantizedRows) else quantize(rows.reshape(-1, rows.shape[-1]))
        w = quantize(weight.detach()) if cache is None else cache.rows_of(weight, quantize)
        straight = x.values.new_zeros((), dtype=call.dtype).expand(x.shape) if x.straight is None else x.straight
        recipe = Recipe(named(name), gradients, quantize)
        y_MN: Tensor = LinearFunction.apply(straight, weight, bias, x, w, recipe)
    return y_MN.reshape(*given.shape[:-1], len(weight))


def _all_in_fp8(
    rows: Tensor | QuantizedRows, weight: Tensor, bias: Tensor | None, cache: WeightCache | None, dtype: torch.dtype
) -> Tensor:
    from distilbeam.kernels.low_precision import triton_fp8

    flat = rows.flattened() if isinstance(rows, QuantizedRows) else rows.reshape(-1, rows.shape[-1])
    with on_device_of(weight):
        x = triton_fp8.quantize(flat) if isinstance(flat, Tensor) else triton_fp8.transposed(flat)
        w = triton_fp8.quantize(weight) if cache is None else cache.rows_of(weight, triton_fp8.quantize)
        if not isinstance(w, triton_fp8.BothWays):  # another implementation filled the cache
            w = triton_fp8.transposed(w)
    straight = flat if isinstance(flat, Tensor) else flat.straight
    if straight is None:
        straight = x.values.new_zeros((), dtype=dtype).expand(x.shape)
    y_MN: Tensor = triton_fp8.AllFp8.apply(straight, weight, bias, x, w)
    return y_MN.reshape(*rows.shape[:-1], len(weight))


def _dtype(rows: Tensor | QuantizedRows) -> torch.dtype:
    if isinstance(rows, Tensor):
        return rows.dtype
    return torch.float32 if rows.straight is None else rows.straight.dtype


def _check(form: str, rows: Tensor | QuantizedRows, weight: Tensor, bias: Tensor | None, gradients: Gradients) -> None:
    if gradients not in ("bf16", "fp8"):
        raise ValueError(f"gradients must be 'bf16' or 'fp8', got {gradients!r}")
    if weight.ndim != 2 or rows.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight must be [outputs, {rows.shape[-1]}] to fit input, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have one value per output, [{len(weight)}], got {list(bias.shape)}")
    if isinstance(rows, QuantizedRows) and rows.values.dtype != FORMATS[form].dtype:
        raise ValueError(f"the rows of {form}_linear must be {FORMATS[form].dtype}, got {rows.values.dtype}")
