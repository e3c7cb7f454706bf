"""Why a product in 8 bits cannot run where it is asked for, and which of those that can is the best."""

from __future__ import annotations

from typing import NamedTuple

import torch

from distilbeam.kernels.quantize.formats import FORMATS
from distilbeam.kernels.quantize.interface import triton_refusals
from distilbeam.kernels.resolve import Reasons, never, pallas_reasons


class Call(NamedTuple):
    """What a backend must know of a call: the format, input and weight, and rows that go through the layer."""

    form: str
    given: torch.Tensor
    weight: torch.Tensor
    dtype: torch.dtype
    gradients: str

    @property
    def rows(self) -> int:
        """Rows of the input."""
        return self.given.numel() // max(1, self.given.shape[-1])


def backends(call: Call) -> dict[str, Reasons]:
    """Order the backends of a call: on a GPU torch's own product first, where its result is wide enough."""
    triton: dict[str, Reasons] = {"triton": lambda: _triton(call)}
    last: dict[str, Reasons] = {"reference": never, "pallas": _pallas}
    if call.form == "fp8":  # that Triton's quantising beside torch's product gains anything was never measured
        return {"scaled_mm": lambda: _scaled_mm(call), **last, **triton}
    own: dict[str, Reasons] = {"int_mm": lambda: _int_mm(call)}
    return {**triton, **own, **last} if call.given.is_cuda else {**last, **triton, **own}


def _pallas() -> list[str]:
    return [*pallas_reasons(), "layers in 8 bits have no kernel there before a TPU has run one"]


def _scaled_mm(call: Call) -> list[str]:
    reasons = []
    if not (call.given.is_cuda and call.weight.is_cuda):
        reasons.append("the tensors are not on a CUDA device")
    elif torch.cuda.get_device_capability(call.given.device) < (8, 9):
        reasons.append("the GPU has no fp8 products (compute capability below 8.9)")
    if torch.float64 in (call.dtype, call.weight.dtype):
        reasons.append("its results are bfloat16, the layer is float64")
    return reasons


def _triton(call: Call) -> list[str]:
    reasons = triton_refusals(FORMATS[call.form], call.given, call.weight)
    if call.form == "fp8" and call.gradients != "fp8":
        reasons.append(f"all of its products are in fp8, gradients in {call.gradients} are not")
    return reasons


def _int_mm(call: Call) -> list[str]:
    reasons = []
    if not (call.given.is_cuda and call.weight.is_cuda):
        reasons.append("the tensors are not on a CUDA device, where it is slower than float32")
    sizes = list(call.weight.shape)
    if call.rows <= 16 or any(size % 8 for size in sizes):
        reasons.append(f"it takes more than 16 rows and multiples of 8, got {[call.rows, *sizes]}")
    return reasons
