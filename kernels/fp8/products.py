"""The product of two scaled 8-bit matrices, one function for each implementation.

reference   values brought back to float32, multiplied there: the definition, on any device
scaled_mm   torch's own 8-bit product, which uses the tensor cores of GPUs from compute capability 8.9
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def reference(a_MK: Tensor, scale_a: Tensor, b_NK: Tensor, scale_b: Tensor) -> Tensor:
    """Multiply a by b transposed in float32.

    Args:
      a_MK: 8-bit values.
      scale_a: float32 [M, 1] or [1, 1].
      b_NK: 8-bit values.
      scale_b: float32 [N, 1] or [1, 1].

    Returns:
      The product, float32 [M, N].
    """
    return (a_MK.float() @ b_NK.float().T) * scale_a * scale_b.T


def scaled_mm(a_MK: Tensor, scale_a: Tensor, b_NK: Tensor, scale_b: Tensor) -> Tensor:
    """Multiply a by b transposed on the tensor cores, with bfloat16 results; arguments as for `reference`."""
    product: Tensor = torch._scaled_mm(
        a_MK.contiguous(), b_NK.contiguous().T, scale_a=scale_a, scale_b=scale_b.T, out_dtype=torch.bfloat16
    )
    return product


def scaled_mm_reasons(*operands: Tensor) -> list[str]:
    """List why torch's 8-bit product cannot work on these operands."""
    reasons = []
    if not all(x.is_cuda for x in operands):
        reasons.append("the tensors are not on a CUDA device")
    elif torch.cuda.get_device_capability(operands[0].device) < (8, 9):
        reasons.append("the GPU has no 8-bit floating-point products (compute capability below 8.9)")
    sizes = [size for x in operands for size in (x.numel() // max(1, x.shape[-1]), x.shape[-1])]
    if any(size % 16 for size in sizes):
        reasons.append(f"every dimension must be a multiple of 16, got {sizes}")
    return reasons
