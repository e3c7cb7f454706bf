"""The definition of rowwise quantisation, in plain torch.

With L the largest number of the format and every operation rounded to float32 to nearest even:

    scale = max(max_j min(|x_j|, largest float32) * (1/L), 2^-100)
    value = round(clamp(x * (1 / scale), -L, L))

The maximum passes over NaN. A NaN stays one in the floating formats; int8 has none, there the row's scale is NaN, so
that the row is NaN when it is brought back. Nothing but the one division of a row is left to the device's discretion.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distilbeam.kernels.quantize.formats import SCALE_FLOOR, Format


@torch.no_grad()
def quantize(x: Tensor, target: Format) -> tuple[Tensor, Tensor]:
    """Quantise each row.

    Args:
      x: floating [..., D]; float64 is rounded to float32 first.
      target: the format.

    Returns:
      Values [..., D] and scale, float32 [..., 1].
    """
    x = x.float()
    if x.is_cpu and x.numel():
        usual = _where_all_are_finite(x, target)
        if usual is not None:
            return usual
    absent = x.isnan()
    scale = row_scale(x.masked_fill(absent, 0).abs(), target)
    scaled = (x * (1 / scale)).clamp_(-target.largest, target.largest)
    if target.dtype == torch.int8:
        whole = scaled.masked_fill_(absent, 0).round_().to(torch.int8)
        return whole, scale.masked_fill(absent.any(dim=-1, keepdim=True), torch.nan)
    return scaled.masked_fill_(absent, torch.nan).to(target.dtype), scale  # every NaN is the one with a clear sign


def _where_all_are_finite(x: Tensor, target: Format) -> tuple[Tensor, Tensor] | None:
    """Give the same bits in half the operations; None where a number is not finite, which only a CPU is asked about.

    No clamp is needed: the largest number of a row becomes L but for two roundings, and both are rounded away.
    """
    largest = x.abs().amax(dim=-1, keepdim=True)
    if not math.isfinite(largest.sum()):
        return None
    scale = largest.mul_(target.reciprocal).clamp_(min=SCALE_FLOOR)
    scaled = x * scale.reciprocal()
    return (scaled.round_() if target.dtype == torch.int8 else scaled).to(target.dtype), scale


def row_scale(size: Tensor, target: Format) -> Tensor:
    """Compute the scale of rows.

    Args:
      size: absolute values without NaN, float32 [..., D].
      target: the format.

    Returns:
      float32 [..., 1].
    """
    if not size.shape[-1]:
        return size.new_full((*size.shape[:-1], 1), SCALE_FLOOR)
    largest = size.amax(dim=-1, keepdim=True).clamp_(max=torch.finfo(torch.float32).max)
    return largest.mul_(target.reciprocal).clamp_(min=SCALE_FLOOR)


def dequantize(values: Tensor, scale: Tensor) -> Tensor:
    """Bring rows back: values * scale, float32 [..., D]."""
    return values.float() * scale
