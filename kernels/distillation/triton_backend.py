"""Launch the Triton kernels of the distillation losses; imported when they are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.distillation.targets import Targets
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.distillation.triton_kernels import dense_rows, dense_sweeps, mark_rows, sparse_rows
from distilbeam.kernels.sizes import cdiv, next_power_of_2

MOST_IN_REGISTERS = 4_096  # classes of a dense row
LONG_DENSE = {"BLOCK": 8192, "num_warps": 32, "maxnreg": 64}
LONG = 48_000  # classes of a row that is worth a whole multiprocessor
LOOK = 1 << 28  # numbers of a gradient from which it is worth to look whether its factor is one


def total(logits_BC: Tensor, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss; see `chunked.total`."""
    rows_B: Tensor = _Rows.apply(logits_BC, list(terms))
    return rows_B.sum() if reduced else rows_B


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_BC: Tensor, terms: list[Term]) -> Tensor:
        losses_B = torch.empty_like(terms[0].scale)
        gradient_BC = torch.empty(logits_BC.shape, dtype=logits_BC.dtype, device=logits_BC.device)
        for number, term in enumerate(terms):
            launch(logits_BC, term, losses_B, gradient_BC, add=number > 0)
        ctx.save_for_backward(gradient_BC)
        return losses_B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_B: Tensor) -> tuple[Tensor, None]:
        (gradient_BC,) = ctx.saved_tensors
        # looking waits for the device, which is cheaper than another pass over many logits, and dearer than one over few
        if gradient_BC.numel() > LOOK and bool((upstream_B == 1).all()):
            return gradient_BC, None
        return gradient_BC * upstream_B[:, None].to(gradient_BC.dtype), None


def launch(
    logits_BC: Tensor, term: Term, losses_B: Tensor, gradient_BC: Tensor, *, add: bool, bias_C: Tensor | None = None
) -> None:
    """Run one term's kernel over all rows.

    Args:
      logits_BC: of any strides.
      term: the term.
      losses_B: float32, written or, with `add`, added to.
      gradient_BC: rows that are dense, likewise; for sparse labels and the only term of the call it may begin, row by
        row, where dense logits do, and be as wide or narrower.
      add: whether to add.
      bias_C: added to the logits of sparse labels; None for 0.
    """
    rows, classes = logits_BC.shape
    if not rows:
        return
    targets = term.targets
    valid_B = (
        torch.ones(rows, dtype=torch.int8, device=logits_BC.device) if term.valid is None else term.valid.to(torch.int8)
    )
    strides = logits_BC.stride()
    slam = targets.flip is not None
    flags = {"ENTROPY": targets.entropy, "SLAM": slam, "FORWARD": targets.forward, "ADD": add}
    accuracy_B = term.scale if targets.accuracy is None else targets.accuracy[:, 0].contiguous()
    if targets.classes is None:
        logy_BC = targets.logprobs.contiguous()
        if classes > MOST_IN_REGISTERS:
            dense_sweeps[(rows,)](
                logits_BC, logy_BC, term.scale, valid_B, losses_B, gradient_BC, classes, *strides, targets.temperature,
                ENTROPY=targets.entropy, ADD=add, **LONG_DENSE,
            )  # fmt: skip
            return
        flip_BC = logy_BC if targets.flip is None else targets.flip
        block = next_power_of_2(classes)
        dense_rows[(rows,)](
            logits_BC, logy_BC, flip_BC, accuracy_B, term.scale, valid_B, losses_B, gradient_BC,
            classes, *strides, targets.temperature, BLOCK=block, num_warps=dense_warps(block), **flags,
        )  # fmt: skip
        return
    kept_BK = targets.classes.to(torch.int32)
    padding_BK = torch.zeros_like(kept_BK) if targets.padding is None else targets.padding
    logy_BK, logy_rest_B = _split(targets)
    flip_BK = logy_BK if targets.flip is None else targets.flip[:, : kept_BK.shape[1]].contiguous()
    width, words = kept_BK.shape[1], words_of(classes)
    bits_BW = torch.empty(rows, words, dtype=torch.int32, device=logits_BC.device)
    sparse_rows[(rows,)](
        logits_BC, logits_BC if bias_C is None else bias_C, bits_BW, kept_BK, padding_BK.to(torch.int8),
        logy_BK, logy_rest_B, flip_BK, accuracy_B, term.scale, valid_B, losses_B, gradient_BC,
        classes, *strides, gradient_BC.stride(0), words, targets.temperature,
        1.0 if targets.rest_temperature is None else targets.rest_temperature,
        K=width, KP=next_power_of_2(width), BIAS=bias_C is not None,
        IN_PLACE=gradient_BC.data_ptr() == logits_BC.data_ptr(),
        REST=targets.rest_temperature is not None, **flags,
        **sparse_block(classes),
    )  # fmt: skip


def words_of(size: int) -> int:
    """Count the words that hold a row's bits: rows begin 128 bytes apart, so that no two share a line of a cache."""
    return 32 * cdiv(size, 1024)


def kept_bits(classes_BK: Tensor, first: int, size: int) -> Tensor:
    """Mark the kept classes among some of all: what a kernel reads beside the logits, 1/16 of their size.

    Args:
      classes_BK: the kept classes, integers [B, k]; padding repeats one of the row.
      first: first class of the part.
      size: classes of the part.

    Returns:
      int32 [B, words]; bit j mod 32 of word j // 32 is set when class first + j is kept.
    """
    (rows, width), words = classes_BK.shape, words_of(size)
    bits_BW = torch.empty(rows, words, dtype=torch.int32, device=classes_BK.device)
    mark_rows[(rows,)](
        classes_BK.to(torch.int32).contiguous(), bits_BW, first, size, words,
        K=width, KP=next_power_of_2(width), BLOCK=512,
    )  # fmt: skip
    return bits_BW


def dense_warps(block: int) -> int:
    """Warps for a row in registers: eight values to a thread, sixteen warps at most."""
    return max(1, min(16, block // 256))


def sparse_block(num_classes: int) -> dict[str, int]:
    """Size of a sweep's block, its warps and registers, measured: so many for long rows that few of these are on their way
    at a time, and the cache holds more of each until it is read again.
    """
    block = max(128, next_power_of_2(num_classes))
    if num_classes >= LONG:
        return {"BLOCK": min(32_768, block), "num_warps": 32, "maxnreg": 64}
    return {
        "BLOCK": min(8192, block),
        "num_warps": max(1, min(16, block // 512)),
        "maxnreg": 32 if block > 4096 else 64,
    }


def _split(targets: Targets) -> tuple[Tensor, Tensor]:
    """Separate the targets of the kept buckets from the rest's."""
    if targets.rest_temperature is None:
        return targets.logprobs.contiguous(), targets.logprobs[:, 0].contiguous()
    return targets.logprobs[:, :-1].contiguous(), targets.logprobs[:, -1].contiguous()
