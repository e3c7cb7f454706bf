"""Which backend of the learned augmented residual serves a call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor

from distilbeam.kernels.laurel import chunked
from distilbeam.kernels.laurel.autograd import Backend
from distilbeam.kernels.laurel.operands import stream_of
from distilbeam.kernels.quantize.formats import FORMATS
from distilbeam.kernels.quantize.interface import triton_refusals
from distilbeam.kernels.resolve import Reasons, never, pallas_reasons, triton_reasons

LARGE = 1 << 17  # numbers from which the blocks beat autograd on a CPU (benchmarks/laurel.py)
MOST_PREVIOUS = 4  # earlier residuals that the Triton kernels have arguments for
READ_AHEAD = 2  # tiles, of the pipelined form; with more of them, or of higher ranks, registers spill
MOST_RANK_AHEAD = 32
MOST_RANK = 64  # whose low-rank products fit the kernels' registers


def backends(
    update: Tensor, residual: Tensor, down: Tensor | None, previous: Sequence[Tensor], quantize: str | None
) -> dict[str, Reasons]:
    """Order the backends for a call: on a GPU the fused kernel, on a CPU autograd while the tensors are small."""
    stream = stream_of(update, residual, previous)
    refusals = partial(_triton, update, stream, down, previous, quantize)
    triton: dict[str, Reasons] = {"triton": refusals, "pipelined": lambda: [*refusals(), *_high(down)]}
    pallas: dict[str, Reasons] = {"pallas": lambda: [*pallas_reasons(), *_wide(stream)]}
    if update.is_cuda:
        return {**triton, "chunked": never, "reference": never, **pallas}
    # a traced graph serves every number of rows, and compilers fuse the reference
    if not torch.compiler.is_compiling() and update.numel() >= LARGE:
        return {"chunked": never, "reference": never, **triton, **pallas}
    return {"reference": never, "chunked": never, **triton, **pallas}


def module_of(name: str) -> Backend:
    """Give a backend's module, importing what it needs."""
    if name in ("triton", "pipelined"):
        from distilbeam.kernels.laurel import triton_backend

        if name == "triton":
            return cast("Backend", triton_backend)
        both = (triton_backend.forward, triton_backend.backward)
        forward, backward = (partial(one, ahead=READ_AHEAD) for one in both)
        return cast("Backend", SimpleNamespace(forward=forward, backward=backward))
    if name == "pallas":
        from distilbeam.kernels.laurel import pallas_backend

        return cast("Backend", pallas_backend)
    return cast("Backend", chunked)


def _triton(
    update: Tensor, stream: torch.dtype, down: Tensor | None, previous: Sequence[Tensor], quantize: str | None
) -> list[str]:
    reasons = triton_reasons(update) if quantize is None else triton_refusals(FORMATS[quantize], update)
    if quantize is None or update.dtype != stream:
        reasons += _wide(stream)
    if down is not None and down.shape[1] > MOST_RANK:
        reasons.append(f"the rank is at most {MOST_RANK} there, got {down.shape[1]}")
    if len(previous) > MOST_PREVIOUS:
        reasons.append(f"at most {MOST_PREVIOUS} earlier residuals are added there, got {len(previous)}")
    return reasons


def _high(down: Tensor | None) -> list[str]:
    if down is None or down.shape[1] <= MOST_RANK_AHEAD:
        return []
    return [f"with tiles read ahead the rank is at most {MOST_RANK_AHEAD}, got {down.shape[1]}"]


def _wide(stream: torch.dtype) -> list[str]:
    if stream.itemsize <= 4:
        return []
    return [f"it computes in float32, the update is {str(stream).removeprefix('torch.')}"]
