"""The definition of the learned augmented residual, in plain torch; gradients by autograd.

x'     = alpha f + beta (x + (x A) B) + sum_j gamma_j p_j, in the dtype that holds f, x and p     arXiv:2411.07501, section 2
normed = x' / sqrt(mean(x'^2) + 1e-6) * norm_weight

The norm is taken of x' as it is stored, so that the backward pass finds in it all it needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distilbeam.kernels.laurel.operands import EPSILON, stream_of, width_of


def residual_sum(
    update: Tensor,
    residual: Tensor,
    alpha: Tensor | float | None,
    beta: Tensor | float | None,
    down: Tensor | None,
    up: Tensor | None,
    previous: Sequence[Tensor],
    gamma: Tensor | None,
) -> Tensor:
    """Compute x'; the arguments are those of `laurel_residual`."""
    stream = stream_of(update, residual, previous)
    dtype = width_of(stream)
    x = residual.to(dtype)
    if down is not None and up is not None:
        low = x @ down.to(dtype)
        x = torch.addmm(x, low, up.to(dtype)) if x.ndim == 2 else x + low @ up.to(dtype)
    total = _plus(_times(beta, x), alpha, update.to(dtype))
    if gamma is not None:
        for coefficient, earlier in zip(gamma.to(dtype).unbind(), previous, strict=True):
            total = total + coefficient * earlier.to(dtype)
    return total.to(stream)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension, then multiply by `weight`; float32 or wider."""
    dtype = width_of(x.dtype)
    return torch.nn.functional.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), EPSILON)


def _times(factor: Tensor | float | None, x: Tensor) -> Tensor:
    return x if factor is None else factor * x


def _plus(total: Tensor, factor: Tensor | float | None, x: Tensor) -> Tensor:
    if isinstance(factor, Tensor):
        return torch.addcmul(total, factor.to(x.dtype), x)
    return torch.add(total, x, alpha=1 if factor is None else factor)
