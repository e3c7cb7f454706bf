"""Matrix products of the fused last layer on a CPU, by whichever of the libraries in torch is faster there.

`torch.mm` calls MKL for float32, which shares a product of few rows and many columns badly between threads: 256 x 256 times
256 x 32,000 takes 1.2 times the processor time on two threads that it takes on one, oneDNN's the same (AMD EPYC, torch 2.13:
58 against 42 ms, and 49 against 42 on one; the product back to the hidden states 48 against 42 and 45 against 42). oneDNN
is behind MKL in small products, and in the weight's gradient, whose left operand it would copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

LEAST = 1 << 23  # multiplications; from here on oneDNN's product is the faster one on one thread and on two


def times_transposed(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Compute a b^T + bias.

    Args:
      a_MK: floating [M, K]; oneDNN copies what is not contiguous.
      b_NK: of the same dtype, [N, K], of any strides.
      bias_N: of the same dtype, [N]; None for 0.

    Returns:
      A new contiguous tensor [M, N]. Nothing is differentiated.
    """
    large = a_MK.is_cpu and a_MK.dtype == torch.float32 and a_MK.numel() * len(b_NK) >= LEAST
    of_one_dnn = _of_one_dnn() if large else None
    if of_one_dnn is not None:
        return of_one_dnn(a_MK, b_NK, bias_N, "none", [], "")
    return torch.mm(a_MK, b_NK.T) if bias_N is None else torch.addmm(bias_N, a_MK, b_NK.T)


@cache
def _of_one_dnn() -> Callable[..., Tensor] | None:
    """Give oneDNN's linear layer, which torch's compiler calls too; None where torch was built without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    operation: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return operation
