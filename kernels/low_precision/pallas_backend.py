"""The 8-bit product through the Pallas kernel; imported when it is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from distilbeam.kernels.low_precision import pallas_kernels
from distilbeam.kernels.quantize.pallas_backend import to_jax, to_torch
from distilbeam.kernels.resolve import interpreting_pallas


def product(
    a_MK: Tensor, scale_a: Tensor, b_NK: Tensor, scale_b: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiply a by b transposed; see `products.reference`."""
    bias = scale_b.new_zeros(len(b_NK)) if bias_N is None else bias_N.float()
    operands = [to_jax(x) for x in (a_MK, b_NK, scale_a, scale_b.T, bias[None, :])]
    name = str(dtype).removeprefix("torch.")
    return to_torch(pallas_kernels.scaled_product(*operands, name, interpret=interpreting_pallas()))
