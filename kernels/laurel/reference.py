"""The definition of the learned augmented residual, in plain torch; gradients by autograd.

x' = alpha f + beta (x + (x A) B) + sum_j gamma_j p_j                                arXiv:2411.07501, section 2
normed = x' / sqrt(mean(x'^2) + eps) * norm_weight
quantised = round(normed / scale),   scale = max |normed| / largest representable, one per row
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
EPSILON = 1e-6


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
    dtype = torch.promote_types(update.dtype, torch.float32)
    x = residual.to(dtype)
    if down is not None and up is not None:
        x = x + (x @ down.to(dtype)) @ up.to(dtype)
    total = _times(alpha, update.to(dtype)) + _times(beta, x)
    if gamma is not None:
        for coefficient, earlier in zip(gamma.to(dtype), previous, strict=True):
            total = total + coefficient * earlier.to(dtype)
    return total


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Divide by the root mean square over the last dimension, then multiply by `weight`."""
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPSILON) * weight.to(x.dtype)


@torch.no_grad()
def quantise_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantise each row to 8 bits.

    Args:
      x: floating [..., D].
      dtype: torch.int8 or torch.float8_e4m3fn.

    Returns:
      The quantised values and their scale, float32 [..., 1], never zero: x is about values * scale.
    """
    largest = LARGEST[dtype]
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / largest).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = (x / scale).clamp(-largest, largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def _times(factor: Tensor | float | None, x: Tensor) -> Tensor:
    return x if factor is None else factor * x
