"""Launch the kernels that prepare the label themselves, in one kernel or in two; imported when one of them is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.devices import on_device_of
from distilbeam.kernels.distillation.given import Given
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.distillation.triton_backend import (
    SPAN,
    Kept,
    solving_block,
    split_targets,
    spreading_block,
    words_of,
)
from distilbeam.kernels.distillation.triton_dense import dense_value_and_gradient
from distilbeam.kernels.distillation.triton_divergences import flags_of
from distilbeam.kernels.distillation.triton_octets import rescale
from distilbeam.kernels.distillation.triton_one_kernel import value_and_gradient
from distilbeam.kernels.distillation.triton_two_kernels import solve_octets, spread_octets
from distilbeam.kernels.labels import DenseLabels, HardLabels, SampledLabels, TopKLabels
from distilbeam.kernels.sizes import cdiv, next_power_of_2

MOST_HELD = 4  # blocks of 8,192 classes in the registers of 16 warps; with more of them registers spill
OCTET = 8  # numbers that are read at once
EDGE = 14  # classes before and behind a row's whole octets, at most
Sparse = TopKLabels | SampledLabels | HardLabels


def one_kernel(logits_BC: Tensor, given: Given, reduced: bool) -> Tensor:
    """Compute the scaled loss, and its gradient at once, which the first backward pass hands on."""
    rows_B: Tensor = _OneKernel.apply(_on_octets(logits_BC), given)[0]
    return rows_B.sum() if reduced else rows_B


def two_kernels(logits_BC: Tensor, given: Given, reduced: bool) -> Tensor:
    """Compute the scaled loss, and in the backward pass, however often there is one, its gradient."""
    rows_B: Tensor = _TwoKernels.apply(_on_octets(logits_BC), given)[0]
    return rows_B.sum() if reduced else rows_B


class _OneKernel(torch.autograd.Function):
    """The rows' losses and their gradient, which the first backward pass hands on and multiplies in place."""

    @staticmethod
    def forward(logits_BC: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        losses_B = torch.empty(len(logits_BC), device=logits_BC.device)
        gradient_BC = _like(logits_BC)
        with on_device_of(logits_BC):
            if isinstance(given.labels, DenseLabels):
                _dense(logits_BC, given.labels, given, losses_B, gradient_BC)
            else:
                _sparse(logits_BC, given.labels, given, losses_B, gradient_BC)
        return losses_B, gradient_BC

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.gradient_BC = output[1]  # not saved: the pass that multiplies it is the one that takes it away

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_B: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        if upstream_B is None:
            return None, None
        gradient_BC, ctx.gradient_BC = ctx.gradient_BC, None
        if gradient_BC is None:
            raise RuntimeError("implementation 'one_kernel' hands its gradient on once; use 'triton' to keep the graph")
        if len(gradient_BC):
            with on_device_of(gradient_BC):
                rescale[(len(gradient_BC),)](
                    gradient_BC, upstream_B, gradient_BC.shape[1], gradient_BC.stride(0), upstream_B.stride(0),
                    BLOCK=min(4096, max(128, next_power_of_2(gradient_BC.shape[1]))), num_warps=4,
                )  # fmt: skip
        return gradient_BC, None


class _TwoKernels(torch.autograd.Function):
    """The rows' losses; then, for the backward pass, what is left of each row's problem."""

    @staticmethod
    def forward(logits_BC: Tensor, given: Given) -> tuple[Tensor, ...]:
        (rows, classes), labels = logits_BC.shape, given.labels
        assert not isinstance(labels, DenseLabels)
        losses_B, rests_B, slopes_B = torch.empty(3, rows, device=logits_BC.device).unbind()
        width = labels.classes.numel() // max(1, rows)
        kept_BK = torch.empty(rows, width, device=logits_BC.device)
        words = words_of(classes + OCTET)
        bits_BW = torch.empty(rows, words, dtype=torch.int32, device=logits_BC.device)
        if rows:
            with on_device_of(logits_BC):
                solve_octets[(rows,)](
                    logits_BC, bits_BW, *_label(labels), *_of_rows(given, losses_B), losses_B, rests_B, slopes_B, kept_BK,
                    classes, logits_BC.stride(0), words, given.temperature, given.rest_temperature, given.share, _ignore(labels),
                    K=width, KP=next_power_of_2(width), ENTROPY=given.entropy, SHIFTED=shifted(logits_BC),
                    WIDE=logits_BC.dtype.itemsize > 2, **flags_of(given.divergence), **given.flags(),
                    **solving_block(classes),
                )  # fmt: skip
        return losses_B, rests_B, slopes_B, kept_BK

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits_BC, ctx.given = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_BC, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_B: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        if upstream_B is None:
            return None, None
        logits_BC, rests_B, slopes_B, kept_BK = ctx.saved_tensors
        gradient_BC, (rows, classes), width = _like(logits_BC), logits_BC.shape, kept_BK.shape[1]
        if rows:
            span = SPAN if classes > SPAN else OCTET * cdiv(classes, OCTET)
            with on_device_of(logits_BC):
                spread_octets[(rows, cdiv(classes, span))](
                    logits_BC, ctx.given.labels.classes, rests_B, slopes_B, kept_BK, upstream_B, gradient_BC,
                    classes, span, logits_BC.stride(0), gradient_BC.stride(0), upstream_B.stride(0),
                    ctx.given.rest_temperature, K=width, KP=next_power_of_2(width), SHIFTED=shifted(logits_BC),
                    WIDE=logits_BC.dtype.itemsize > 2, **spreading_block(span),
                )  # fmt: skip
        return gradient_BC, None


def in_place(z_RC: Tensor, term: Term, losses_R: Tensor) -> None:
    """Overwrite logits by their gradient.

    Args:
      z_RC: bfloat16 or float16, rows that are dense and begin 16 bytes apart; on return the gradient.
      term: of the same rows, prepared, with sparse labels and a rest bucket, without SLaM's mixing.
      losses_R: float32, written.
    """
    (rows, classes), targets, kept = z_RC.shape, term.targets, Kept.of(term)
    assert not shifted(z_RC)
    words = words_of(classes + OCTET)
    bits_RW = torch.empty(rows, words, dtype=torch.int32, device=z_RC.device)
    value_and_gradient[(rows,)](
        z_RC, bits_RW, kept.classes, bits_RW if kept.padding is None else kept.padding, *split_targets(targets),
        term.scale, term.scale, bits_RW if kept.valid is None else kept.valid, losses_R, z_RC,
        classes, z_RC.stride(0), z_RC.stride(0), words, targets.temperature, targets.rest_temperature, 1.0, 0, 0,
        ENTROPY=targets.entropy, WEIGHTED=True, DIVIDED=False, GIVEN=False, TAIL=0, BUCKET=False, HARD=False,
        SHIFTED=False, **flags_of(targets.divergence), **kept.flags(), **held_blocks(classes),
    )  # fmt: skip


def _sparse(logits_BC: Tensor, labels: Sparse, given: Given, losses_B: Tensor, gradient_BC: Tensor) -> None:
    rows, classes = logits_BC.shape
    if not rows:
        return
    words, width = words_of(classes + OCTET), labels.classes.numel() // rows
    bits_BW = torch.empty(rows, words, dtype=torch.int32, device=logits_BC.device)
    apart, (logprobs, tail) = shifted(logits_BC), _label(labels)[1:]
    value_and_gradient[(rows,)](
        logits_BC, bits_BW, labels.classes, bits_BW, logprobs, tail, *_of_rows(given, losses_B), losses_B, gradient_BC,
        classes, logits_BC.stride(0), gradient_BC.stride(0), words, given.temperature, given.rest_temperature,
        given.share, _ignore(labels), 0, K=width, KP=next_power_of_2(width), PADDED=False, ENTROPY=given.entropy, GIVEN=True,
        SHIFTED=apart, **flags_of(given.divergence), **given.flags(),
        **held_blocks(classes - EDGE if apart else classes),
    )  # fmt: skip


def _dense(logits_BC: Tensor, labels: DenseLabels, given: Given, losses_B: Tensor, gradient_BC: Tensor) -> None:
    rows, classes = logits_BC.shape
    if not rows:
        return
    teacher_BC = labels.logprobs
    if (teacher_BC.stride(0) - logits_BC.stride(0)) % OCTET or teacher_BC.data_ptr() % 16:
        teacher_BC = _like(logits_BC, teacher_BC.dtype).copy_(teacher_BC)  # so that octets of both lie on 16 bytes
    block = min(8192, max(128, next_power_of_2(classes)))
    dense_value_and_gradient[(rows,)](
        logits_BC, teacher_BC, *_of_rows(given, losses_B), losses_B, gradient_BC, classes, logits_BC.stride(0),
        teacher_BC.stride(0), gradient_BC.stride(0), given.temperature, given.share, ENTROPY=given.entropy,
        SHIFTED=shifted(logits_BC), **given.of_rows(), **dense_block(block),
    )  # fmt: skip


def shifted(x_BC: Tensor) -> bool:
    """Say whether rows begin elsewhere than on 16 bytes (32 of float32)."""
    return x_BC.stride(0) % OCTET != 0


def _on_octets(logits_BC: Tensor) -> Tensor:
    """Copy logits that lie column by column or do not begin on 16 bytes."""
    if logits_BC.stride(1) != 1 or logits_BC.stride(0) < logits_BC.shape[1]:
        return logits_BC.contiguous()
    return logits_BC.clone() if logits_BC.data_ptr() % 16 else logits_BC


def _like(logits_BC: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make room whose rows begin where the logits' do between two octets; without gaps where the logits have none."""
    rows, classes = logits_BC.shape
    width = classes + (logits_BC.stride(0) - classes) % OCTET
    return torch.empty(rows, width, dtype=dtype or logits_BC.dtype, device=logits_BC.device)[:, :classes]


def _label(labels: Sparse) -> tuple[Tensor, Tensor, Tensor]:
    """Give classes, log-probabilities and the tail's; what is missing is not looked at."""
    if isinstance(labels, HardLabels):
        return labels.classes, labels.classes, labels.classes
    tail = labels.tail_logmass if isinstance(labels, TopKLabels) else None
    return labels.classes, labels.logprobs, labels.logprobs if tail is None else tail


def _of_rows(given: Given, otherwise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give weight, normalizer and mask; what is missing is not looked at."""
    mask = None if given.mask is None else given.mask.view(torch.int8)
    found = given.weight, given.normalizer, mask
    weight, normalizer, valid = (otherwise if x is None else x for x in found)
    return weight, normalizer, valid


def _ignore(labels: Sparse) -> int:
    return labels.ignore_index if isinstance(labels, HardLabels) else 0


def held_blocks(classes: int) -> dict[str, int]:
    """Size of a block, how many of them stay in registers, and the warps and registers for that.

    Args:
      classes: in whole octets of a row, at least.
    """
    block = 8192 if classes >= 8192 else max(128, next_power_of_2(max(1, classes) + 1) // 2)
    return {
        "BLOCK": block,
        "HELD": max(0, min(MOST_HELD, classes // block)),
        "num_warps": max(1, block // 512),
        "maxnreg": 128,
    }


def dense_block(block: int) -> dict[str, int]:
    """Size of a block of a dense row, and the warps and registers for that."""
    return {"BLOCK": block, "num_warps": max(1, min(32, block // 256)), "maxnreg": 64}
