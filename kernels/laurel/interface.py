"""The learned augmented residual: `laurel_residual`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from distilbeam.kernels.laurel import reference
from distilbeam.kernels.resolve import never, no_kernel, resolve

QUANTISED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


class NormedResidual(NamedTuple):
    """A residual and its normalised form.

    Attributes:
      residual: x', [..., D].
      normed: RMS-normalised x', [..., D]; in 8 bits when quantised.
      scale: what the quantised values must be multiplied by, float32 [..., 1]; None when not quantised.
    """

    residual: Tensor
    normed: Tensor
    scale: Tensor | None


@overload
def laurel_residual(
    update: Tensor,
    residual: Tensor,
    *,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    norm_weight: None = None,
    quantize: None = None,
    previous: Sequence[Tensor] = (),
    gamma: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor: ...


@overload
def laurel_residual(
    update: Tensor,
    residual: Tensor,
    *,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    norm_weight: Tensor,
    quantize: Literal["fp8", "int8"] | None = None,
    previous: Sequence[Tensor] = (),
    gamma: Tensor | None = None,
    implementation: str | None = None,
) -> NormedResidual: ...


def laurel_residual(
    update: Tensor,
    residual: Tensor,
    *,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    norm_weight: Tensor | None = None,
    quantize: Literal["fp8", "int8"] | None = None,
    previous: Sequence[Tensor] = (),
    gamma: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | NormedResidual:
    """Add a layer's output to its input by learned weights and a low-rank map.

    x' = alpha update + beta (residual + (residual down) up) + sum_j gamma_j previous_j, accumulated in float32. With
    none of the learned parts it is the plain residual.

    Args:
      update: the layer's output f(x), floating [..., D].
      residual: the layer's input x, floating [..., D].
      alpha: weight of the update, a scalar tensor or number; None for 1.
      beta: weight of the residual, likewise.
      down: A, floating [D, r]; given together with `up`.
      up: B, floating [r, D].
      norm_weight: weight of an RMS norm of x', floating [D]; asks for the normed form beside x'.
      quantize: `fp8` (e4m3) or `int8`: the normed form in 8 bits with one scale per row; not differentiable.
      previous: earlier residuals, each [..., D].
      gamma: their weights, floating [len(previous)].
      implementation: `reference` or None; there is no `triton` or `pallas` kernel of this operation.

    Returns:
      x' in the dtype of `update`, [..., D]; with `norm_weight` a NormedResidual.

    Raises:
      ValueError: shapes disagree, or parts that belong together are not given together.
      NotImplementedError: the implementation asked for cannot run here.

    Example:
      >>> import torch
      >>> from distilbeam.kernels import laurel_residual
      >>> laurel_residual(torch.ones(2), torch.ones(2), alpha=0.5, beta=1.5)
      tensor([2., 2.])

    References:
      Menghani et al., Learned Augmented Residual Layer, arXiv:2411.07501, section 2.
    """
    _check(update, residual, down, up, norm_weight, quantize, previous, gamma)
    resolve("laurel_residual", implementation, {"reference": never, **no_kernel("triton", "pallas")})
    total = reference.residual_sum(update, residual, alpha, beta, down, up, previous, gamma)
    if norm_weight is None:
        return total.to(update.dtype)
    normed = reference.rms_norm(total, norm_weight)
    if quantize is None:
        return NormedResidual(total.to(update.dtype), normed.to(update.dtype), None)
    return NormedResidual(total.to(update.dtype), *reference.quantise_rows(normed, QUANTISED[quantize]))


def _check(
    update: Tensor,
    residual: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    norm_weight: Tensor | None,
    quantize: str | None,
    previous: Sequence[Tensor],
    gamma: Tensor | None,
) -> None:
    dim = update.shape[-1]
    for name, tensor in [("residual", residual), *((f"previous[{j}]", x) for j, x in enumerate(previous))]:
        if tensor.shape != update.shape:
            raise ValueError(f"{name} must have the shape of update, {list(update.shape)}, got {list(tensor.shape)}")
    if (down is None) != (up is None):
        raise ValueError("down and up must be given together: the low-rank map is (x down) up")
    if down is not None and up is not None and not (down.shape[0] == up.shape[1] == dim and down.shape == up.T.shape):
        raise ValueError(
            f"down must be [{dim}, r] and up [r, {dim}] for one rank r, got {list(down.shape)} and {list(up.shape)}"
        )
    count = 0 if gamma is None else len(gamma)
    if count != len(previous):
        raise ValueError(f"gamma must have one weight for each of the {len(previous)} previous tensors, got {count}")
    if quantize is not None and (norm_weight is None or quantize not in QUANTISED):
        raise ValueError(f"quantize must be 'fp8' or 'int8' and needs norm_weight, got {quantize!r}")
