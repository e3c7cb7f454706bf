"""Which implementation of an operation runs.

Every operation has a `reference` and faster backends. A backend says in words why it cannot serve a call; an
implementation asked for by name runs or raises with all of its reasons, and one that is not named is the first in the
operation's order of preference without any. Nothing is probed before a call needs it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

import torch

Reasons = Callable[[], Sequence[str]]


def resolve(operation: str, implementation: str | None, backends: Mapping[str, Reasons]) -> str:
    """Choose the implementation of one call.

    Args:
      operation: the operation's public name, for messages.
      implementation: the name asked for; None takes the first backend that can run.
      backends: from each backend's name to a function that gives its reasons not to run, best backend first.

    Returns:
      The name of the backend to run.

    Raises:
      ValueError: the operation has no implementation of that name.
      NotImplementedError: the implementation asked for, or every one of them, cannot serve this call.
    """
    if implementation is not None and implementation not in backends:
        near = get_close_matches(implementation, backends, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"implementation of {operation} must be one of {', '.join(sorted(backends))} or None, "
            f"got {implementation!r}{hint}"
        )
    refusals = []
    for name in backends if implementation is None else [implementation]:
        reasons = backends[name]()
        if not reasons:
            return name
        refusals += [f"{name}: {reason}" for reason in reasons]
    able = [name for name, reasons in backends.items() if name != implementation and not reasons()]
    way_out = f"; {' and '.join(able)} can" if able else ""
    raise NotImplementedError(f"{operation} cannot run here ({'; '.join(refusals)}){way_out}")


def never() -> Sequence[str]:
    """Give no reason: the backend serves every call."""
    return ()


def triton_reasons(*tensors: torch.Tensor | None) -> list[str]:
    """List why Triton cannot work on these tensors; its interpreter (TRITON_INTERPRET=1) also serves the CPU."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("the package triton is not installed")
    if not interpreting_triton():
        if not torch.cuda.is_available():
            reasons.append("no CUDA device")
        elif not all(t is None or t.is_cuda for t in tensors):
            reasons.append("the tensors are not on a CUDA device")
    return reasons


def pallas_reasons(*tensors: torch.Tensor | None) -> list[str]:
    """List why Pallas cannot work on these tensors; its interpreter (DISTILBEAM_PALLAS_INTERPRET=1) serves the CPU."""
    reasons = []
    if importlib.util.find_spec("jax") is None:
        reasons.append("the package jax is not installed")
    if any(t is not None and t.device.type == "tpu" for t in tensors):
        if not has_torch_tpu():
            reasons.append("torch.tpu is not loaded, which the package torch_tpu does")
    elif not interpreting_pallas():
        reasons.append("no TPU device; DISTILBEAM_PALLAS_INTERPRET=1 interprets the kernels on a CPU")
    return reasons


def has_torch_tpu() -> bool:
    """Say whether torch_tpu, which torch loads by itself when it is installed, has put its operations into torch."""
    return hasattr(torch, "tpu")


def interpreting_pallas() -> bool:
    """Say whether Pallas runs its kernels in its interpreter, as the environment asks."""
    return os.environ.get("DISTILBEAM_PALLAS_INTERPRET", "0") == "1"


def interpreting_triton() -> bool:
    """Say whether Triton runs its kernels in its interpreter, as the environment asks."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
