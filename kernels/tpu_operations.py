"""JAX functions as operations of torch, for the `tpu` device of torch_tpu.

Where torch_tpu is installed, its `jax_op` exports a function for the shapes at hand and runs it inside torch's own graph,
eager or compiled. Everywhere an operation also has a form for the CPU: the same function in Pallas' interpreter when the
environment asks for it, else plain torch, so that a training step can be traced, exported and tested without a TPU. Shapes
under tracing come from a form of their own, which takes symbolic sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor

from distilbeam.kernels.resolve import has_torch_tpu, interpreting_pallas


def register(name: str, function: Callable[..., Any], on_cpu: Callable[..., Any], like: Callable[..., Any]) -> Any:
    """Register an operation once.

    Args:
      name: its name, below the namespace `distilbeam`.
      function: the JAX function for a TPU, annotated with jax.Array and numbers.
      on_cpu: the same in torch, annotated with Tensor and numbers.
      like: gives empty tensors of the results' shapes and dtypes.

    Returns:
      The operation; its gradient is the caller's to register.
    """
    if has_torch_tpu():
        operation = torch.tpu.pallas.jax_op(f"distilbeam::{name}", function)  # type: ignore[attr-defined]
        operation.register_kernel("cpu")(on_cpu)
    else:
        operation = torch.library.custom_op(f"distilbeam::{name}", on_cpu, mutates_args=(), device_types="cpu")
    operation.register_fake(like)
    return operation


def interpreted(function: Callable[..., Any], *values: Tensor | float) -> tuple[Tensor, ...] | None:
    """Run a JAX function in Pallas' interpreter on CPU tensors, where the environment asks for it.

    Args:
      function: takes arrays, numbers and `interpret`.
      values: its arguments.

    Returns:
      The results; None where plain torch is to be used.
    """
    if not interpreting_pallas():
        return None
    import jax

    with torch.no_grad():
        given = [jax.dlpack.from_dlpack(x.detach().contiguous()) if isinstance(x, Tensor) else x for x in values]
        made = function(*given, interpret=True)
        made = made if isinstance(made, tuple) else (made,)
        # a result of an operation of torch may not be its argument, nor share memory that JAX may use again
        return tuple(torch.utils.dlpack.from_dlpack(x.block_until_ready()).clone() for x in made)


def buckets_with_gradient(buckets: Any, gradient: Any) -> None:
    """Give the operation that finds the buckets' logits the one that spreads their gradients as its derivative.

    That the buckets are relative to the row's largest logit is left out of the derivative: no loss depends on it.

    Args:
      buckets: from logits, kept classes and tau to the kept logits [B, K], the rest's, its largest and its sum [B, 1].
      gradient: from logits, kept classes, the slopes of kept and rest, the rest's largest logit and tau to the logits'
        gradient.
    """

    def setup(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
        logits, classes, ctx.tau = inputs
        ctx.save_for_backward(logits, classes, *output[2:])

    def backward(ctx: Any, kept_BK: Tensor, slope_B1: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        logits, classes, top_B1, total_B1 = ctx.saved_tensors
        top_B1 = top_B1.masked_fill(torch.isneginf(top_B1), torch.inf)  # an empty rest takes no gradient
        slope_B1 = torch.where(slope_B1 == 0, 0, slope_B1 / total_B1)
        return gradient(logits, classes, kept_BK.contiguous(), slope_B1, top_B1, ctx.tau), None, None

    buckets.register_autograd(backward, setup_context=setup)


once = functools.lru_cache(maxsize=None)
