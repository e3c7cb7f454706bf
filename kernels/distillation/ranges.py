"""Whether the arguments of a call lie where they must, looked at where looking costs no wait for a device."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_values(
    name: str,
    value: Tensor | float | None,
    valid: Tensor | None,
    *,
    least: float,
    most: float = math.inf,
    whole: bool = False,
    open_below: bool = False,
) -> None:
    """Refuse numbers outside of a range.

    Args:
      name: of the argument.
      value: a number, or a tensor, which is looked at on a CPU alone; None passes.
      valid: rows that count, bool [B]; None for all. What the others hold is not looked at.
      least: the smallest number allowed.
      most: the largest one; infinity itself is never allowed.
      whole: only whole numbers are allowed.
      open_below: `least` itself is not allowed.

    Raises:
      ValueError: a number is outside.
    """
    if value is None or (isinstance(value, Tensor) and not value.is_cpu):
        return
    numbers = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    outside = ~((numbers > least if open_below else numbers >= least) & (numbers <= most) & numbers.isfinite())
    if whole and numbers.is_floating_point():
        outside |= numbers != numbers.round()
    if valid is not None and numbers.ndim and numbers.shape == valid.shape:
        outside &= valid
    if bool(outside.any()):
        kind = "a whole number of at least" if whole else "more than" if open_below else "at least"
        limits = f"between {least} and {most}" if most < math.inf else f"{kind} {least}"
        found = numbers[outside][0] if numbers.ndim else numbers
        raise ValueError(f"{name} must be {limits}, got {found.item():g}")
