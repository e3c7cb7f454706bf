"""The learned augmented residual: `laurel_residual`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from distilbeam.kernels.compiling import not_compiled, not_narrowed
from distilbeam.kernels.laurel import reference
from distilbeam.kernels.laurel.autograd import Backend, LaurelFunction, Plan, wanted_of
from distilbeam.kernels.laurel.backends import backends, module_of
from distilbeam.kernels.laurel.operands import NormedResidual, stream_of, width_of
from distilbeam.kernels.quantize.formats import FORMATS, Format, QuantizedRows, stand_in
from distilbeam.kernels.quantize.interface import quantize_rowwise
from distilbeam.kernels.resolve import resolve

Quantized = Literal["fp8", "int8"]


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
    quantize: None = None,
    previous: Sequence[Tensor] = (),
    gamma: Tensor | None = None,
    implementation: str | None = None,
) -> NormedResidual[Tensor]: ...


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
    quantize: Quantized,
    previous: Sequence[Tensor] = (),
    gamma: Tensor | None = None,
    implementation: str | None = None,
) -> NormedResidual[QuantizedRows]: ...


def laurel_residual(
    update: Tensor,
    residual: Tensor,
    *,
    alpha: Tensor | float | None = None,
    beta: Tensor | float | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    norm_weight: Tensor | None = None,
    quantize: Quantized | None = None,
    previous: Sequence[Tensor] = (),
    gamma: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor | NormedResidual[Tensor] | NormedResidual[QuantizedRows]:
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
      quantize: `fp8` (e4m3) or `int8`: the normed form as rows in 8 bits, made in the same pass, for `fp8_linear` or
        `int8_linear`, which send its gradient back as if nothing were rounded.
      previous: earlier residuals, each [..., D].
      gamma: their weights, floating [len(previous)].
      implementation: `reference` (autograd, to any order), `chunked` (any device), `triton` (CUDA), `pallas` (TPU);
        None chooses by size and device. `pipelined` is Triton's form with tiles read ahead, which was never measured.

    Returns:
      x' in the dtype that `update`, `residual` and `previous` are promoted to, [..., D]; with `norm_weight` a
      NormedResidual, whose second part is the norm of x' as it is stored, in the dtype of `update`.

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
    name = resolve("laurel_residual", implementation, backends(update, residual, down, previous, quantize))
    with not_narrowed(update.device.type):
        if name == "reference":
            total = reference.residual_sum(update, residual, alpha, beta, down, up, previous, gamma)
            return total if norm_weight is None else _normed_by_reference(total, norm_weight, quantize, update.dtype)
        learned = _learned(alpha), _learned(beta), _learned(gamma)
        coefficients = _coefficients(update, width_of(stream_of(update, residual, previous)), alpha, beta, gamma)
        target = None if quantize is None else FORMATS[quantize]
        small = (coefficients, down, up, norm_weight)
        made: list[Tensor] = _by_backend(module_of(name), target, learned, [update, residual, *previous], small)
        whole, normed, values, scale = made
    if norm_weight is None:
        return whole
    if quantize is None:
        return NormedResidual(whole, normed)
    return NormedResidual(whole, QuantizedRows(values, scale, normed if normed.requires_grad else None))


@not_compiled  # a kernel already
def _by_backend(
    backend: Backend,
    target: Format | None,
    learned: tuple[bool, bool, bool],
    rows: list[Tensor],
    small: tuple[Tensor | None, ...],
) -> list[Any]:
    shape = rows[0].shape
    flat = [x.reshape(-1, shape[-1]) for x in rows]
    tensors = (*flat[:2], *small, *flat[2:])
    made = LaurelFunction.apply(Plan(backend, target, wanted_of(tensors, learned)), *tensors)[:4]
    return [None if x is None else x.reshape(*shape[:-1], x.shape[-1]) for x in made]


def _normed_by_reference(
    total: Tensor, norm_weight: Tensor, quantize: Quantized | None, dtype: torch.dtype
) -> NormedResidual[Tensor] | NormedResidual[QuantizedRows]:
    normed = reference.rms_norm(total, norm_weight)
    if quantize is None:
        return NormedResidual(total, normed.to(dtype))
    rows = quantize_rowwise(normed.detach(), FORMATS[quantize].dtype, implementation="reference")
    return NormedResidual(total, QuantizedRows(rows.values, rows.scale, stand_in(normed.to(dtype))))


def _coefficients(
    update: Tensor, dtype: torch.dtype, alpha: Tensor | float | None, beta: Tensor | float | None, gamma: Tensor | None
) -> Tensor:
    """Put alpha, beta and the gammas into one tensor, through which autograd reaches each."""
    device = update.device
    parts = [
        x.to(device=device, dtype=dtype).reshape(1)
        if isinstance(x, Tensor)
        else torch.full((1,), 1.0 if x is None else x, dtype=dtype, device=device)  # copies nothing to a GPU
        for x in (alpha, beta)
    ]
    return torch.cat(parts if gamma is None else [*parts, gamma.to(dtype)])


def _learned(factor: Tensor | float | None) -> bool:
    return isinstance(factor, Tensor) and factor.requires_grad


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
    if quantize is not None and (norm_weight is None or quantize not in ("fp8", "int8")):
        raise ValueError(f"quantize must be 'fp8' or 'int8' and needs norm_weight, got {quantize!r}")
