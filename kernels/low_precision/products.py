"""The product of two matrices of quantised rows, one function for each implementation.

reference   float64 for int8, whose sums it holds exactly, float32 for the floating formats: the definition
scaled_mm   torch's own fp8 product, on the tensor cores of GPUs from compute capability 8.9
int_mm      torch's own int8 product, whose sums are scaled in a second pass
triton      int8 alone, in a file of its own
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MULTIPLE = 16  # of sizes that the tensor cores' 8-bit products take
Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


def reference(
    a_MK: Tensor, scale_a: Tensor, b_NK: Tensor, scale_b: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiply a by b transposed.

    Args:
      a_MK: 8-bit values.
      scale_a: float32 [M, 1].
      b_NK: 8-bit values.
      scale_b: float32 [N, 1].
      bias_N: added to every row, or None.
      dtype: of the result; everything before is float32.

    Returns:
      The product, [M, N].
    """
    wide = torch.float64 if a_MK.dtype == torch.int8 else torch.float32
    total_MN = (a_MK.to(wide) @ b_NK.to(wide).T).float().mul_(scale_a).mul_(scale_b.T)
    return (total_MN if bias_N is None else total_MN.add_(bias_N.float())).to(dtype)


def scaled_mm(
    a_MK: Tensor, scale_a: Tensor, b_NK: Tensor, scale_b: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiply a by b transposed on the tensor cores; arguments as for `reference`.

    The result is rounded to bfloat16, which is what it comes in, whatever its dtype. Sizes that are no multiples of 16 are
    padded with zeros.
    """
    rows, outputs = len(a_MK), len(b_NK)
    if not rows or not a_MK.shape[1]:
        return reference(a_MK, scale_a, b_NK, scale_b, bias_N, dtype)
    beyond = -outputs % MULTIPLE
    if beyond:
        scale_b = torch.nn.functional.pad(scale_b, (0, 0, 0, beyond), value=1.0)
        bias_N = None if bias_N is None else torch.nn.functional.pad(bias_N, (0, beyond))
    product: Tensor = torch._scaled_mm(
        _padded(a_MK, 0),
        _padded(b_NK, beyond).T,
        scale_a=scale_a.contiguous(),
        scale_b=scale_b.T.contiguous(),
        bias=None if bias_N is None else bias_N.bfloat16(),
        out_dtype=torch.bfloat16,
    )
    return product[:, :outputs].to(dtype)


def _padded(values: Tensor, rows: int) -> Tensor:
    """Add zeros up to a multiple of 16 columns, and some rows."""
    columns = -values.shape[1] % MULTIPLE
    if not columns and not rows:
        return values.contiguous()
    bits = torch.nn.functional.pad(values.view(torch.uint8), (0, columns, 0, rows))  # zero is zero in every format
    return bits.view(values.dtype)


def int_mm(
    a_MK: Tensor, scale_a: Tensor, b_NK: Tensor, scale_b: Tensor, bias_N: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiply a by b transposed with int32 sums; arguments as for `reference`."""
    total_MN = torch._int_mm(a_MK.contiguous(), b_NK.contiguous().T).float().mul_(scale_a).mul_(scale_b.T)
    return (total_MN if bias_N is None else total_MN.add_(bias_N.float())).to(dtype)


def named(name: str) -> Product:
    """Give an implementation's product, importing what it needs."""
    if name == "triton":
        from distilbeam.kernels.low_precision import triton_backend

        return triton_backend.product
    return {"reference": reference, "scaled_mm": scaled_mm, "int_mm": int_mm}[name]
