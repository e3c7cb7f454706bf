"""The 8-bit formats, and what a row of numbers in one of them is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCALE_FLOOR = 2.0**-100  # of scales: subnormal numbers become zero, on devices that flush them to zero and on others


class Format(NamedTuple):
    """An 8-bit format.

    Attributes:
      dtype: its torch dtype.
      largest: the largest number it holds.
      reciprocal: 1 / largest, rounded to float32; a row's scale is a product with it, because a compiler may turn a
        division by a constant into this product anyway.
    """

    dtype: torch.dtype
    largest: float
    reciprocal: float


def _format(dtype: torch.dtype, largest: float) -> Format:
    return Format(dtype, largest, float(torch.tensor(1 / largest, dtype=torch.float32)))


FORMATS = {
    "fp8": _format(torch.float8_e4m3fn, 448.0),
    "fp8-e5m2": _format(torch.float8_e5m2, 57344.0),
    "int8": _format(torch.int8, 127.0),
}
FORMAT_OF = {one.dtype: one for one in FORMATS.values()}


@dataclass(frozen=True)
class QuantizedRows:
    """Numbers in 8 bits: x is about values * scale.

    Attributes:
      values: int8, float8_e4m3fn or float8_e5m2, [..., D].
      scale: float32 [..., 1], positive; NaN marks an int8 row that had a NaN.
      straight: stands for x in autograd: [..., D] in the dtype of x, holds no numbers and takes no memory. Its gradient
        is that of x, the rounding taken for the identity. None when x had no gradient.
    """

    values: Tensor
    scale: Tensor
    straight: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the values."""
        return self.values.shape

    def flattened(self) -> QuantizedRows:
        """Give the same rows as matrices [M, D] and [M, 1]."""
        dim = self.values.shape[-1]
        straight = None if self.straight is None else self.straight.reshape(-1, dim)
        return QuantizedRows(self.values.reshape(-1, dim), self.scale.reshape(-1, 1), straight)


class StraightThrough(torch.autograd.Function):
    """A tensor without numbers that hands its gradient to x as it is."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Stand for x."""
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """Pass the gradient on."""
        return gradient


def stand_in(x: Tensor) -> Tensor | None:
    """Make what stands for x in autograd; None when x needs no gradient."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return None
    straight: Tensor = StraightThrough.apply(x)
    return straight
