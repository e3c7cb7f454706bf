"""The fused last layer and loss through the Pallas kernels, on tensors that JAX can share; imported when it is chosen.

The buckets' problem stays in torch, between two JAX functions: one that finds the buckets' logits, one that brings
their gradients to hidden, weight and bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch.utils.dlpack
from torch import Tensor

from distilbeam.kernels.distillation.terms import Term
from distilbeam.kernels.linear_distillation import pallas_kernels
from distilbeam.kernels.linear_distillation.buckets import solve
from distilbeam.kernels.linear_distillation.gradients import Gradients, Operands, apply_fused
from distilbeam.kernels.resolve import interpreting_pallas


def total(hidden_BH: Tensor, weight_CH: Tensor, bias_C: Tensor | None, terms: Sequence[Term], reduced: bool) -> Tensor:
    """Compute the scaled loss; see `chunked.total`."""
    return apply_fused(_run, Operands(hidden_BH, weight_CH, bias_C), terms, reduced)


def _run(operands: Operands, terms: Sequence[Term], wanted: Sequence[bool]) -> tuple[Tensor, Gradients]:
    sums = Gradients.zeros(operands, wanted, torch.float32)
    losses_B = torch.zeros_like(terms[0].scale)
    if not len(operands.hidden):
        return losses_B, sums.like(operands)
    hidden, weight = _shared(operands.hidden), _shared(operands.weight)
    bias = jnp.zeros(len(operands.weight)) if operands.bias is None else _shared(operands.bias.float())
    for term in terms:
        targets = term.targets
        assert targets.classes is not None
        classes, tau = _shared(targets.classes.to(torch.int32)), targets.rest_temperature
        interpret = interpreting_pallas()
        kept, rest = pallas_kernels.first_pass(hidden, weight, bias, classes, tau or 1.0, interpret=interpret)
        solved = solve(_back(kept), None if tau is None else _back(rest), term)
        losses_B = losses_B + solved.losses
        if any(wanted):
            slopes = _shared(solved.kept), _shared(solved.slope), _shared(solved.rest)
            found = pallas_kernels.gradients(
                hidden, weight, bias, classes, *slopes, tau=tau or 1.0, interpret=interpret
            )
            for total, part in zip(sums, found, strict=True):
                if total is not None:
                    total += _back(part)
    return losses_B, sums.like(operands)


def _shared(tensor: Tensor) -> Any:
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def _back(array: Any) -> Tensor:
    tensor: Tensor = torch.utils.dlpack.from_dlpack(array.block_until_ready())
    return tensor
