"""Launch the Triton kernels of the distillation losses; imported when they are chosen.

Sparse labels are solved in the forward pass and spread in the backward pass, which reads the logits again. Dense ones, which
would have to be read again as well, have their gradient made in the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.devices import on_device_of
from distilbeam.kernels.distillation.targets import Targets
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.distillation.triton_dense import dense_rows, dense_sweeps
from distilbeam.kernels.distillation.triton_divergences import flags_of
from distilbeam.kernels.distillation.triton_kernels import solve_rows, spread_rows
from distilbeam.kernels.sizes import cdiv, next_power_of_2

MOST_IN_REGISTERS = 4_096  # classes of a dense row
LONG_DENSE = {"BLOCK": 8192, "num_warps": 32, "maxnreg": 64}
LONG = 48_000  # classes of a row that is worth a whole multiprocessor
SPAN = 16_384  # classes of a row whose gradient one program makes
LOOK = 1 << 28  # numbers of a dense gradient from which it is worth to look whether its factor is one


def total(logits_BC: Tensor, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss; see `chunked.total`."""
    if logits_BC.stride(1) != 1:  # columns further apart would be read one by one
        logits_BC = logits_BC.contiguous()
    if all(term.targets.classes is not None for term in terms):
        rows_B: Tensor = _SparseRows.apply(logits_BC, list(terms), [Kept.of(term) for term in terms])[0]
    else:
        rows_B = _Rows.apply(logits_BC, list(terms))[0]
    return rows_B.sum() if reduced else rows_B


class Kept(NamedTuple):
    """A term's kept classes as the kernels take them, and which rows count."""

    classes: Tensor
    padding: Tensor | None
    valid: Tensor | None

    @classmethod
    def of(cls, term: Term) -> Kept:
        """Take them from a term with sparse labels."""
        targets = term.targets
        assert targets.classes is not None
        return cls(
            targets.classes.to(torch.int32).contiguous(),
            None if targets.padding is None else targets.padding.to(torch.int8),
            None if term.valid is None else term.valid.to(torch.int8),
        )

    def flags(self) -> dict[str, Any]:
        """Give what the kernels are compiled for."""
        width = self.classes.shape[1]
        return {
            "K": width,
            "KP": next_power_of_2(width),
            "PADDED": self.padding is not None,
            "MASKED": self.valid is not None,
        }


class Solved(NamedTuple):
    """What is left of a term's problem; see `solve_rows`.

    Attributes:
      rests: the rest's largest logit, [B].
      rest_slopes: gradient of the rest's logit over the rest's sum, [B].
      kept_slopes: the kept classes' gradients, [B, k].
    """

    rests: Tensor
    rest_slopes: Tensor
    kept_slopes: Tensor


class _SparseRows(torch.autograd.Function):
    """The rows' losses; then, for the backward pass, what is left of each term's problem."""

    @staticmethod
    def forward(logits_BC: Tensor, terms: list[Term], kept: list[Kept]) -> tuple[Tensor, ...]:
        losses_B = torch.empty_like(terms[0].scale)
        solved: list[Tensor] = []
        with on_device_of(logits_BC):
            for number, (term, one) in enumerate(zip(terms, kept, strict=True)):
                solved += solve(logits_BC, term, one, losses_B, add=number > 0)[0]
        return losses_B, *solved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits_BC, terms, ctx.kept = inputs
        ctx.taus = [term.targets.rest_temperature for term in terms]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_BC, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_B: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None]:
        if upstream_B is None:
            return None, None, None
        logits_BC, *solved = ctx.saved_tensors
        gradient_BC = torch.empty(logits_BC.shape, dtype=logits_BC.dtype, device=logits_BC.device)
        with on_device_of(logits_BC):
            for number, (kept, tau) in enumerate(zip(ctx.kept, ctx.taus, strict=True)):
                one = Solved(*solved[3 * number : 3 * number + 3])
                spread(logits_BC, kept, one, tau, gradient_BC, upstream_B=upstream_B, add=number > 0)
        return gradient_BC, None, None


class _Rows(torch.autograd.Function):
    """The rows' losses and their gradient."""

    @staticmethod
    def forward(logits_BC: Tensor, terms: list[Term]) -> tuple[Tensor, Tensor]:
        losses_B = torch.empty_like(terms[0].scale)
        gradient_BC = torch.empty(logits_BC.shape, dtype=logits_BC.dtype, device=logits_BC.device)
        with on_device_of(logits_BC):
            for number, term in enumerate(terms):
                launch(logits_BC, term, losses_B, gradient_BC, add=number > 0)
        return losses_B, gradient_BC

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_B: Tensor | None, _: Any) -> tuple[Tensor | None, None]:
        if upstream_B is None:
            return None, None
        (gradient_BC,) = ctx.saved_tensors
        # looking waits for the device, which is cheaper than another pass over many logits, and dearer than one over few
        looking = gradient_BC.numel() > LOOK and not (upstream_B.is_cuda and torch.cuda.is_current_stream_capturing())
        if looking and bool((upstream_B == 1).all()):
            return gradient_BC, None
        return gradient_BC * upstream_B[:, None].to(gradient_BC.dtype), None


def launch(
    logits_BC: Tensor, term: Term, losses_B: Tensor, gradient_BC: Tensor, *, add: bool, bias_C: Tensor | None = None
) -> None:
    """Compute one term's losses and their gradient.

    Args:
      logits_BC: rows that are dense.
      term: the term.
      losses_B: float32, written or, with `add`, added to.
      gradient_BC: rows that are dense, likewise; for sparse labels and the only term of the call it may begin, row by
        row, where dense logits do, and be as wide or narrower.
      add: whether to add.
      bias_C: added to the logits of sparse labels; None for 0.
    """
    if not len(logits_BC):
        return
    if term.targets.classes is None:
        _dense(logits_BC, term, losses_B, gradient_BC, add)
        return
    kept = Kept.of(term)
    solved, bits_BW = solve(logits_BC, term, kept, losses_B, add=add, bias_C=bias_C)
    tau = term.targets.rest_temperature
    spread(logits_BC, kept, solved, tau, gradient_BC, add=add, bias_C=bias_C, bits_BW=bits_BW)


def _dense(logits_BC: Tensor, term: Term, losses_B: Tensor, gradient_BC: Tensor, add: bool) -> None:
    (rows, classes), stride, targets = logits_BC.shape, logits_BC.stride(0), term.targets
    valid_B = (
        torch.ones(rows, dtype=torch.int8, device=logits_BC.device) if term.valid is None else term.valid.to(torch.int8)
    )
    logy_BC = targets.logprobs.contiguous()
    if classes > MOST_IN_REGISTERS:
        dense_sweeps[(rows,)](
            logits_BC, logy_BC, term.scale, valid_B, losses_B, gradient_BC, classes, stride, targets.temperature,
            ENTROPY=targets.entropy, ADD=add, **flags_of(targets.divergence), **LONG_DENSE,
        )  # fmt: skip
        return
    accuracy_B = term.scale if targets.accuracy is None else targets.accuracy[:, 0].contiguous()
    flip_BC = logy_BC if targets.flip is None else targets.flip
    block = next_power_of_2(classes)
    dense_rows[(rows,)](
        logits_BC, logy_BC, flip_BC, accuracy_B, term.scale, valid_B, losses_B, gradient_BC,
        classes, stride, targets.temperature, BLOCK=block, num_warps=dense_warps(block),
        ENTROPY=targets.entropy, SLAM=targets.flip is not None, FORWARD=targets.forward, ADD=add,
        **flags_of(targets.divergence),
    )  # fmt: skip


def solve(
    logits_BC: Tensor, term: Term, kept: Kept, losses_B: Tensor, *, add: bool, bias_C: Tensor | None = None
) -> tuple[Solved, Tensor]:
    """Compute one term's losses, and what the gradient needs of its problem.

    Args:
      logits_BC: rows that are dense.
      term: the term, with sparse labels.
      kept: its kept classes.
      losses_B: float32, written or, with `add`, added to.
      add: whether to add.
      bias_C: added to the logits; None for 0.

    Returns:
      What is left of the problem, and the bits of the kept classes, int32 [B, words].
    """
    (rows, classes), targets = logits_BC.shape, term.targets
    words, width = words_of(classes), kept.classes.shape[1]
    bits_BW = torch.empty(rows, words, dtype=torch.int32, device=logits_BC.device)
    rests, rest_slopes = torch.empty(2, rows, device=logits_BC.device).unbind()
    solved = Solved(rests, rest_slopes, torch.empty(rows, width, device=logits_BC.device))
    if not rows:
        return solved, bits_BW
    logy_BK, logy_rest_B = split_targets(targets)
    flip_BK = logy_BK if targets.flip is None else targets.flip[:, :width].contiguous()
    accuracy_B = term.scale if targets.accuracy is None else targets.accuracy[:, 0].contiguous()
    solve_rows[(rows,)](
        logits_BC, _or(bias_C, logits_BC), bits_BW, kept.classes, _or(kept.padding, bits_BW), logy_BK, logy_rest_B,
        flip_BK, accuracy_B, term.scale, _or(kept.valid, bits_BW), losses_B, *solved,
        classes, logits_BC.stride(0), words, targets.temperature, _or(targets.rest_temperature, 1.0),
        REST=targets.rest_temperature is not None, ENTROPY=targets.entropy, SLAM=targets.flip is not None,
        FORWARD=targets.forward, ADD=add, BIAS=bias_C is not None, **flags_of(targets.divergence),
        **kept.flags(), **solving_block(classes),
    )  # fmt: skip
    return solved, bits_BW


def spread(
    logits_BC: Tensor,
    kept: Kept,
    solved: Solved,
    tau: float | None,
    gradient_BC: Tensor,
    *,
    add: bool,
    upstream_B: Tensor | None = None,
    bias_C: Tensor | None = None,
    bits_BW: Tensor | None = None,
) -> None:
    """Make one term's gradient.

    Args:
      logits_BC: as they were solved.
      kept: the term's kept classes.
      solved: what is left of the term's problem.
      tau: temperature of its rest; None when there is none.
      gradient_BC: rows that are dense, written or, with `add`, added to; see `launch`.
      add: whether to add.
      upstream_B: float32, of any stride, which multiplies the rows' gradients; None for 1.
      bias_C: as it was solved.
      bits_BW: the bits of the kept classes, where they are still there.
    """
    rows, classes = logits_BC.shape
    if not rows:
        return
    in_place = gradient_BC.data_ptr() == logits_BC.data_ptr()
    span = classes if in_place or bits_BW is not None else min(classes, SPAN)
    parts = cdiv(classes, span)
    marked = bits_BW is not None
    if bits_BW is None:
        bits_BW = torch.empty(rows * parts, words_of(span), dtype=torch.int32, device=logits_BC.device)
    spread_rows[(rows, parts)](
        logits_BC, _or(bias_C, logits_BC), bits_BW, kept.classes, _or(kept.padding, bits_BW), *solved,
        _or(upstream_B, solved.rests), _or(kept.valid, bits_BW), gradient_BC, classes, span, logits_BC.stride(0),
        gradient_BC.stride(0), 0 if upstream_B is None else upstream_B.stride(0), bits_BW.shape[1], _or(tau, 1.0),
        REST=tau is not None, SCALED=upstream_B is not None, MARKED=marked, IN_PLACE=in_place, ADD=add,
        BIAS=bias_C is not None, **kept.flags(), **spreading_block(span),
    )  # fmt: skip


def _or(x: Any, otherwise: Any) -> Any:
    """Give what there is, or anything where the kernel will not look."""
    return otherwise if x is None else x


def words_of(size: int) -> int:
    """Count the words that hold a row's bits: rows begin 128 bytes apart, so that no two share a line of a cache."""
    return 32 * cdiv(size, 1024)


def dense_warps(block: int) -> int:
    """Warps for a row in registers: eight values to a thread, sixteen warps at most."""
    return max(1, min(16, block // 256))


def solving_block(num_classes: int) -> dict[str, int]:
    """Size of a block of a row that is summed up by one program, and its warps and registers."""
    block = max(128, next_power_of_2(num_classes))
    if num_classes >= LONG:
        return {"BLOCK": min(32_768, block), "num_warps": 32, "maxnreg": 64}
    return {"BLOCK": min(8192, block), "num_warps": max(1, min(16, block // 512))}


def spreading_block(span: int) -> dict[str, int]:
    """Size of a block of a gradient, which needs no sums, and its warps."""
    block = min(4096, max(128, next_power_of_2(span)))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def split_targets(targets: Targets) -> tuple[Tensor, Tensor]:
    """Separate the targets of the kept buckets from the rest's."""
    if targets.rest_temperature is None:
        return targets.logprobs.contiguous(), targets.logprobs[:, 0].contiguous()
    return targets.logprobs[:, :-1].contiguous(), targets.logprobs[:, -1].contiguous()
