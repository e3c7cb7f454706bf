"""The learned augmented residual through the Pallas kernels; imported when it is chosen."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distilbeam.kernels.laurel import chunked, pallas_kernels
from distilbeam.kernels.laurel.operands import Gradients, Kept, Made, Operands, Slopes, Wanted
from distilbeam.kernels.quantize.formats import Format
from distilbeam.kernels.quantize.pallas_backend import to_jax, to_torch
from distilbeam.kernels.resolve import interpreting_pallas


def forward(operands: Operands, target: Format | None) -> Made:
    """Compute x' and what was asked for besides; see `chunked.forward`."""
    f, x, *small, previous = operands
    if not f.numel():
        return chunked.forward(operands, target)
    given = [_array(one) for one in (f, x, *small)]
    stream = str(operands.stream).removeprefix("torch.")
    earlier = [_array(p) for p in previous]
    made = pallas_kernels.forward(*given, earlier, target, stream, interpret=interpreting_pallas())
    return Made(**{name: to_torch(value) for name, value in made.items()})


def backward(kept: Kept, slopes: Slopes, wanted: Wanted) -> Gradients:
    """Compute the gradients that are wanted; see `chunked.backward`."""
    given = {"f": kept.update, "x": kept.residual, "total": kept.total, "low": kept.low, "inverse": kept.inverse}
    given |= {"down": kept.down, "up": kept.up, **{f"p{j}": p for j, p in enumerate(kept.previous)}}
    given["weight"] = None if kept.norm_weight is None else kept.norm_weight[None, :]
    above = {"d_total": slopes.total, "d_normed": slopes.normed}
    rows = next(slope for slope in slopes if slope is not None)
    if not rows.numel():
        return chunked.backward(kept, slopes, wanted)
    dtypes = tuple(str(dtype).removeprefix("torch.") for dtype in kept.dtypes)
    found = pallas_kernels.backward(
        _there(given), _array(kept.coefficients), _there(above), wanted, dtypes, interpret=interpreting_pallas()
    )
    made = {name: to_torch(value) for name, value in found.items()}
    count = len(kept.coefficients)
    return Gradients(
        update=made.get("d_f"),
        residual=made.get("d_x"),
        coefficients=made["d_coefficients"][0, :count] if "d_coefficients" in made else None,
        down=made.get("d_down"),
        up=made.get("d_up"),
        norm_weight=made["d_weight"][0] if "d_weight" in made else None,
        previous=[made[f"d_p{j}"] for j in range(count - 2)] if wanted.previous else [],
    )


def _array(x: Tensor | None) -> Any:
    return None if x is None else to_jax(x)


def _there(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    return {name: to_jax(x) for name, x in tensors.items() if x is not None}
