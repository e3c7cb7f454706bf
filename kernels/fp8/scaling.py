"""Bring a matrix to 8-bit floating point with one scale for each row or for the whole.

The scale is max |x| over the largest value of the format, so that the largest element just fits; a zero matrix gets the
scale of the smallest normal number and stays zero. Reference: Micikevicius et al., arXiv:2209.05433.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scaling = Literal["row", "tensor"]
FORWARD = torch.float8_e4m3fn
BACKWARD = torch.float8_e5m2  # gradients need the range more than the mantissa
LARGEST = {FORWARD: 448.0, BACKWARD: 57344.0}


def to_fp8(x: Tensor, dtype: torch.dtype, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Quantise a matrix.

    Args:
      x: floating [M, K].
      dtype: FORWARD or BACKWARD.
      scaling: `row`: one scale per row; `tensor`: one for all.

    Returns:
      The 8-bit values [M, K], and the scale, float32 [M, 1] or [1, 1], that they must be multiplied by.
    """
    size = x.detach().abs().float()
    largest = size.amax(dim=1, keepdim=True) if scaling == "row" else size.amax().reshape(1, 1)
    scale = (largest / LARGEST[dtype]).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.detach().float() / scale).clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scale
