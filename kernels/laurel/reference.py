"""The definition of the learned augmented residual, in plain torch; gradients by autograd.

x'     = alpha f + beta (x + (x A) B) + sum_j gamma_j p_j, rounded to the dtype of f     arXiv:2411.07501, section 2
normed = x' / sqrt(mean(x'^2) + 1e-6) * norm_weight

The norm is taken of x' as it is stored, so that the backward pass finds in it all it needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distilbeam.kernels.laurel.operands import EPSILON, width_of


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
    dtype = width_of(update.dtype)
    x = residual.to(dtype)
    if down is not None and up is not None:
        x = x + (x @ down.to(dtype)) @ up.to(dtype)
    total = _times(alpha, update.to(dtype)) + _times(beta, x)
    if gamma is not None:
        for coefficient, earlier in zip(gamma.to(dtype).unbind(), previous, strict=True):
            total = total + coefficient * earlier.to(dtype)
    return total.to(update.dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension, then multiply by `weight`; float32 or wider."""
    wide = x.to(width_of(x.dtype))
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPSILON) * weight.to(wide.dtype)


def _times(factor: Tensor | float | None, x: Tensor) -> Tensor:
    return x if factor is None else factor * x
