"""What the backends of the fused last layer share: the sums of its gradients, and the autograd node.

When the losses are added up, the gradients are made in the forward pass and only scaled by what comes from above. When
every row's loss is wanted, their factors are not known before the backward pass, which then does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilbeam.kernels.compiling import not_narrowed
from distilbeam.kernels.devices import on_device_of
from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation.operands import Layer, Operands


class Gradients(NamedTuple):
    """Sums of the operands' gradients; None where nobody asked."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, operands: Operands, wanted: Sequence[bool], dtype: torch.dtype) -> Gradients:
        """Start from zero for the operands that are wanted."""
        empty = cls.empty(operands, wanted, dtype)
        return cls(*(None if x is None else x.zero_() for x in empty))

    @classmethod
    def empty(cls, operands: Operands, wanted: Sequence[bool], dtype: torch.dtype) -> Gradients:
        """Make room for the operands that are wanted, to be written before it is read."""
        return cls(
            *(
                torch.empty(x.shape, dtype=dtype, device=x.device) if want and x is not None else None
                for x, want in zip(operands[:3], wanted, strict=True)
            )
        )

    def like(self, dtypes: Sequence[torch.dtype | None]) -> Gradients:
        """Bring the sums to the dtypes of what they are the gradients of."""
        pairs = zip(dtypes, self, strict=True)
        return Gradients(*(None if dtype is None or value is None else value.to(dtype) for dtype, value in pairs))


Run = Callable[[Operands, Sequence[Term], Sequence[bool]], tuple[Tensor, Gradients]]


def apply_fused(run: Run, layer: Layer, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss by a function that gives losses and gradients together.

    Args:
      run: from operands, terms and which gradients are wanted to the rows' losses [B] and the gradients.
      layer: the last layer.
      terms: from `make_terms`.
      reduced: whether to add the rows up.

    Returns:
      A scalar, or the rows' losses [B]; differentiable once.
    """
    operands, leaves, terms = layer.operands, layer.leaves, list(terms)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
    if not any(wanted):
        losses_B = _undisturbed(run, operands, terms, wanted)[0]
        return losses_B.sum() if reduced else losses_B
    call = Call(run, terms, reduced, tuple(wanted), tuple(None if x is None else x.dtype for x in leaves))
    value: Tensor = _Fused.apply(call, *operands, *leaves)[0]
    return value


def _undisturbed(
    run: Run, operands: Operands, terms: Sequence[Term], wanted: Sequence[bool]
) -> tuple[Tensor, Gradients]:
    """Run on the operands' device, where autocast narrows nothing; a backward pass may be called inside of one."""
    with not_narrowed(operands.hidden.device.type), on_device_of(operands.hidden):
        return run(operands, terms, wanted)


class Call(NamedTuple):
    """A call of the fused layer, but for its tensors.

    Attributes:
      run: gives losses and gradients together.
      terms: of all rows.
      reduced: whether to add the rows up.
      wanted: which of hidden, weight and bias want a gradient.
      dtypes: of these gradients.
    """

    run: Run
    terms: list[Term]
    reduced: bool
    wanted: tuple[bool, ...]
    dtypes: tuple[torch.dtype | None, ...]


OPERANDS = len(Operands._fields)


class _Fused(torch.autograd.Function):
    """The loss, and the gradients that its backward pass hands on, where the losses are added up."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = Operands(*tensors[:OPERANDS])  # type: ignore[arg-type]
        if not call.reduced:
            return _undisturbed(call.run, operands, call.terms, (False, False, False))[0], None, None, None
        losses_B, gradients = _undisturbed(call.run, operands, call.terms, call.wanted)
        return losses_B.sum(), *gradients.like(call.dtypes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.call = inputs[0]
        made = [x for x in output[1:] if x is not None]
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(output[1:] if ctx.call.reduced else inputs[1 : 1 + OPERANDS]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (1 + OPERANDS)
        if upstream is None:
            return *nothing, None, None, None
        call: Call = ctx.call
        if not call.reduced:
            terms = [Term(term.targets, term.scale * upstream, term.valid) for term in call.terms]
            gradients = _undisturbed(call.run, Operands(*ctx.saved_tensors), terms, call.wanted)[1]
            return *nothing, *gradients.like(call.dtypes)
        # that the loss itself was differentiated is looked at where looking waits for nobody
        unit = upstream.is_cpu and float(upstream) == 1.0
        return *nothing, *(g if g is None or unit else g * upstream.to(g.dtype) for g in ctx.saved_tensors)
