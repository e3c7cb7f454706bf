"""The last layer in fewer bits: what `precision` means, what it changes, and where it pays.

Inputs and weight are rounded row by row, to bfloat16 or to 8 bits with a scale per row (`kernels/quantize`); the loss and
its gradients are then those of the rounded layer, its rounding taken for the identity. With L the loss of a row, z and z'
its logits before and after rounding, and every objective that is a forward KL,

    |L(z') - L(z)| <= 2 T max_j |z'_j - z_j|,    |z'_j - z_j| <= sum_h |x_h| |dw_jh| + |dx_h| |w_jh + dw_jh|

because L's gradient by the logits is T (S f - y), or such a difference spread over the classes of a bucket, with f and y
of mass one at most; and for a row of largest number m the rounding errors are at most

    bf16   |d| <= 2^-8 |x|          int8   |d| <= m / 254          fp8   |d| <= max(2^-4 |x|, 2^-10 m / 448)

(each a few float32 roundings more).
"""

from __future__ import annotations

from typing import Literal, cast, get_args

import torch
from torch import Tensor

from distilbeam.kernels.linear_distillation.operands import Layer
from distilbeam.kernels.low_precision.shapes import why_not
from distilbeam.kernels.quantize.formats import FORMATS, QuantizedRows, stand_in
from distilbeam.kernels.quantize.interface import quantize_rowwise

Precision = Literal["bf16", "fp8", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def narrowed(layer: Layer, precision: Precision) -> Layer:
    """Round a layer's inputs and weight; what is given as rows stays as it is."""
    return layer._replace(hidden=_rounded(layer.hidden, precision), weight=_rounded(layer.weight, precision))


def checked(layer: Layer, precision: str | None) -> Precision | None:
    """Bring the argument of a call to what its layer runs in.

    Args:
      layer: of the call.
      precision: a name, `table`, or None.

    Returns:
      What to round to; None for nothing.

    Raises:
      ValueError: the name is unknown, contradicts rows that are given, or the layer is float64.
    """
    if precision is not None and precision not in (*PRECISIONS, "table"):
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, table or None, got {precision!r}")
    for name, x in (("hidden", layer.hidden), ("weight", layer.weight)):
        given = _format_name(x) if isinstance(x, QuantizedRows) else None
        if given is not None and given not in PRECISIONS:
            raise ValueError(f"{name} must be rows of torch.int8 or torch.float8_e4m3fn, got {given}")
        if given is not None and given != precision:
            raise ValueError(f"precision must be {given!r} because {name} is given in it, got {precision!r}")
        if precision is not None and isinstance(x, Tensor) and x.dtype == torch.float64:
            raise ValueError(f"precision {precision!r} rounds floats of at most 32 bits, {name} is float64")
    if precision != "table":
        return cast("Precision | None", precision)
    hidden, weight = layer.operands[:2]
    return loss_precision(len(hidden), hidden.shape[1], len(weight), hidden.device)[0]


def autocast(layer: Layer) -> tuple[Layer, Precision | None]:
    """Do to a layer what autocast does to linear layers where it is on.

    Args:
      layer: of a call that rounds to no precision of its own.

    Returns:
      The layer, brought to autocast's dtype unless that is bfloat16; and `bf16`, to round it to, if it is.
    """
    hidden, weight, bias = layer
    given = (hidden, weight)
    kind = layer.operands.hidden.device.type
    if not torch.is_autocast_enabled(kind) or any(not isinstance(x, Tensor) or x.dtype == torch.float64 for x in given):
        return layer, None
    dtype = torch.get_autocast_dtype(kind)
    if dtype == torch.bfloat16:
        return layer, "bf16"
    hidden, weight = (x.to(dtype) for x in given if isinstance(x, Tensor))
    return Layer(hidden, weight, bias), None


def loss_precision(rows: int, features: int, classes: int, device: torch.device) -> tuple[Precision | None, str]:
    """Say what `precision="table"` makes of a last layer, for a trainer to print.

    Args:
      rows: B.
      features: H.
      classes: C.
      device: of the layer.

    Returns:
      The precision, None for the layer's own, and why.
    """
    reasons = []
    for form in ("fp8", "int8"):
        reason = why_not(form, rows, features, classes, device)
        if reason is None:
            return form, f"{rows:,} x {features:,} x {classes:,} is where {form} pays"
        reasons.append(reason)
    return None, "; ".join(reasons)


def _rounded(x: Tensor | QuantizedRows, precision: Precision) -> QuantizedRows:
    if isinstance(x, QuantizedRows):
        return x
    if precision == "bf16":
        return QuantizedRows(x.detach().bfloat16(), torch.ones(len(x), 1, device=x.device), stand_in(x))
    return quantize_rowwise(x, FORMATS[precision].dtype)


def _format_name(rows: QuantizedRows) -> str:
    return next((name for name, one in FORMATS.items() if one.dtype == rows.values.dtype), "bf16")
