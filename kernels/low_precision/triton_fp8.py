"""A linear layer whose three products are all in e4m3, by torch's product on operands that Triton kernels lay out for it.

The arithmetic is that of `autograd.py` with gradients in fp8; what differs is that input, weight and gradient are quantised
both ways in one operation each, so that nothing is transposed or quantised twice. Not measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.devices import on_device_of
from distilbeam.kernels.low_precision.products import MULTIPLE, scaled_mm
from distilbeam.kernels.low_precision.triton_both_ways import both_ways, slope_sizes, slopes
from distilbeam.kernels.quantize.formats import FORMATS, QuantizedRows
from distilbeam.kernels.sizes import cdiv

E4M3 = FORMATS["fp8"]
CONSTANTS = {"LARGEST": E4M3.largest, "RECIPROCAL": E4M3.reciprocal}
ROWS = {"BM": 64, "BK": 128, "num_warps": 8}
SLOPES = {"BM": 64, "BN": 128, "num_warps": 8}


@dataclass(frozen=True)
class BothWays(QuantizedRows):
    """Rows in e4m3, and the same values column by column.

    Attributes:
      transposed: [K, M], its rows padded with zeros to a multiple of 16.
    """

    transposed: Tensor | None = None


def quantize(x: Tensor) -> BothWays:
    """Quantise rows [M, K]; the bits are those of `quantize_rowwise`."""
    x = x.detach()
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, inner = x.shape
    padded = MULTIPLE * cdiv(rows, MULTIPLE)
    values, scale = x.new_empty(rows, inner, dtype=E4M3.dtype), x.new_empty(rows, 1, dtype=torch.float32)
    transposed = x.new_empty(inner, padded, dtype=E4M3.dtype)
    if x.numel():
        both_ways[(cdiv(padded, ROWS["BM"]),)](
            x, values, transposed, scale, rows, inner, x.stride(0), padded, **CONSTANTS, **ROWS
        )
    return BothWays(values, scale, None, transposed)


def transposed(rows: QuantizedRows) -> BothWays:
    """Lay rows that were quantised elsewhere out column by column too."""
    bits = rows.values.view(torch.uint8).T
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[1] % MULTIPLE)).contiguous()
    return BothWays(rows.values, rows.scale, rows.straight, padded.view(E4M3.dtype))


class AllFp8(torch.autograd.Function):
    """y = x W^T + b; `straight` and `weight` are there for their gradients."""

    @staticmethod
    def forward(straight_MK: Tensor, _: Tensor, bias_N: Tensor | None, x: BothWays, w: BothWays) -> Tensor:
        """Compute y in the dtype of `straight`."""
        with on_device_of(x.values):
            return scaled_mm(x.values, x.scale, w.values, w.scale, bias_N, straight_MK.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        """Keep what the backward products read."""
        straight_MK, weight_NK, bias_N, x, w = inputs
        ctx.kept = x.transposed, x.scale, w.transposed, w.scale
        ctx.dtypes = (straight_MK.dtype, weight_NK.dtype, None if bias_N is None else bias_N.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        """Compute the gradients that somebody wants."""
        x_KM, scale_x, w_KN, scale_w = ctx.kept
        dx_MK = dw_NK = db_N = None
        with torch.autocast(dy_MN.device.type, enabled=False), on_device_of(dy_MN):
            (by_rows, row_scale), (by_columns, column_scale) = _slopes(dy_MN.contiguous(), scale_w, scale_x)
            ones = scale_x.new_ones(len(x_KM), 1)
            if ctx.needs_input_grad[0]:
                dx_MK = scaled_mm(by_rows, row_scale, w_KN[:, : by_rows.shape[1]], ones, None, ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                dw_NK = scaled_mm(by_columns, column_scale, x_KM, ones, None, ctx.dtypes[1])
            if ctx.needs_input_grad[2]:
                db_N = dy_MN.sum(dim=0, dtype=torch.float32).to(ctx.dtypes[2])
        return dx_MK, dw_NK, db_N, None, None


def _slopes(dy_MN: Tensor, scale_w: Tensor, scale_x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Quantise a gradient with the weight's scales by rows, and with the input's by columns."""
    rows, outputs = dy_MN.shape
    padded = MULTIPLE * cdiv(rows, MULTIPLE)
    of_rows, of_columns = scale_x.new_empty(rows), scale_x.new_zeros(outputs)
    by_rows, by_columns = (dy_MN.new_empty(size, dtype=E4M3.dtype) for size in ((rows, outputs), (outputs, padded)))
    row_scale, column_scale = torch.empty_like(of_rows), torch.empty_like(of_columns)
    given = dy_MN, scale_w.contiguous(), scale_x.contiguous(), of_rows, of_columns
    slope_sizes[(cdiv(rows, SLOPES["BM"]),)](*given, rows, outputs, **SLOPES)
    slopes[(cdiv(padded, SLOPES["BM"]), cdiv(outputs, SLOPES["BN"]))](
        *given, by_rows, by_columns, row_scale, column_scale, rows, outputs, padded, **CONSTANTS, **SLOPES
    )
    return (by_rows, row_scale[:, None]), (by_columns, column_scale[:, None])
