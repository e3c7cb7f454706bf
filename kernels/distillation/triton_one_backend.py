"""Launch the kernel that makes value and gradient together; imported when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.devices import on_device_of
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.distillation.triton_backend import Kept, split_targets, words_of
from distilbeam.kernels.distillation.triton_one_kernel import rescale, value_and_gradient
from distilbeam.kernels.sizes import next_power_of_2

MOST_HELD = 4  # blocks of 8,192 classes in the registers of 16 warps; with more of them registers spill


def total(logits_BC: Tensor, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss of one term; see `chunked.total`."""
    (term,) = terms
    if logits_BC.stride(1) != 1:
        logits_BC = logits_BC.contiguous()
    rows_B: Tensor = _OneKernel.apply(logits_BC, term, Kept.of(term))[0]
    return rows_B.sum() if reduced else rows_B


class _OneKernel(torch.autograd.Function):
    """The rows' losses and their gradient, which the first backward pass hands on and multiplies in place."""

    @staticmethod
    def forward(logits_BC: Tensor, term: Term, kept: Kept) -> tuple[Tensor, Tensor]:
        losses_B = torch.empty_like(term.scale)
        gradient_BC = torch.empty(logits_BC.shape, dtype=logits_BC.dtype, device=logits_BC.device)
        with on_device_of(logits_BC):
            launch(logits_BC, term, kept, losses_B, gradient_BC)
        return losses_B, gradient_BC

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.gradient_BC = output[1]  # not saved: the pass that multiplies it is the one that takes it away

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_B: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
        if upstream_B is None:
            return None, None, None
        gradient_BC, ctx.gradient_BC = ctx.gradient_BC, None
        if gradient_BC is None:
            raise RuntimeError("implementation 'one_kernel' hands its gradient on once; use 'triton' to keep the graph")
        if len(gradient_BC):
            with on_device_of(gradient_BC):
                rescale[(len(gradient_BC),)](
                    gradient_BC, upstream_B, gradient_BC.shape[1], gradient_BC.stride(0), upstream_B.stride(0),
                    BLOCK=min(4096, max(128, next_power_of_2(gradient_BC.shape[1]))), num_warps=4,
                )  # fmt: skip
        return gradient_BC, None, None


def launch(logits_BC: Tensor, term: Term, kept: Kept, losses_B: Tensor, gradient_BC: Tensor) -> None:
    """Compute a term's losses and gradient, which may take the place of the logits.

    Args:
      logits_BC: bfloat16 or float16, rows that are dense.
      term: with sparse labels and a rest bucket, without SLaM's mixing.
      kept: its kept classes.
      losses_B: float32, written.
      gradient_BC: of the logits' dtype, written.
    """
    (rows, classes), targets = logits_BC.shape, term.targets
    if not rows:
        return
    words = words_of(classes)
    bits_BW = torch.empty(rows, words, dtype=torch.int32, device=logits_BC.device)
    zero = torch.zeros(1, dtype=torch.int32, device=logits_BC.device)
    value_and_gradient[(rows,)](
        logits_BC, bits_BW, kept.classes, bits_BW if kept.padding is None else kept.padding, *split_targets(targets),
        term.scale, bits_BW if kept.valid is None else kept.valid, losses_B, gradient_BC, zero, classes,
        logits_BC.stride(0), gradient_BC.stride(0), words, targets.temperature, targets.rest_temperature,
        ENTROPY=targets.entropy, **kept.flags(), **block_of(classes),
    )  # fmt: skip


def block_of(classes: int) -> dict[str, int]:
    """Size of a block, how many of them stay in registers, and the warps and registers for that."""
    block = 8192 if classes >= 8192 else max(128, next_power_of_2(classes + 1) // 2)
    return {
        "BLOCK": block,
        "HELD": min(MOST_HELD, classes // block),
        "num_warps": max(1, block // 512),
        "maxnreg": 128,
    }
