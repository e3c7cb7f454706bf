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
    value: Tensor = _Fused.apply(run, list(terms), reduced, layer.operands, *layer.leaves)
    return value


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Run, terms: list[Term], reduced: bool, operands: Operands, *leaves: Tensor | None
    ) -> Tensor:
        ctx.run, ctx.terms, ctx.reduced = run, terms, reduced
        ctx.dtypes = [None if x is None else x.dtype for x in leaves]
        if not reduced:
            ctx.save_for_backward(*operands)
            return run(operands, terms, (False, False, False))[0]
        losses_B, gradients = run(operands, terms, ctx.needs_input_grad[4:])
        ctx.save_for_backward(*gradients.like(ctx.dtypes))
        return losses_B.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.reduced:
            terms = [Term(term.targets, term.scale * upstream, term.valid) for term in ctx.terms]
            gradients = ctx.run(Operands(*ctx.saved_tensors), terms, ctx.needs_input_grad[4:])[1]
            return None, None, None, None, *gradients.like(ctx.dtypes)
        unit = float(upstream) == 1.0  # the loss itself was differentiated
        scaled = [g if g is None or unit else g * upstream.to(g.dtype) for g in ctx.saved_tensors]
        return None, None, None, None, *scaled
