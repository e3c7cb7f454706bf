"""What the backends of the learned augmented residual share: its operands as matrices, what they make, its gradients."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from distilbeam.kernels.quantize.formats import QuantizedRows

EPSILON = 1e-6
Normed = TypeVar("Normed", Tensor, QuantizedRows)


class NormedResidual(NamedTuple, Generic[Normed]):
    """A residual and its normalised form.

    Attributes:
      residual: x', [..., D].
      normed: RMS-normalised x', [..., D]; rows in 8 bits when quantised.
    """

    residual: Tensor
    normed: Normed


class Operands(NamedTuple):
    """The arguments with their leading dimensions made one.

    Attributes:
      update: f, [M, D].
      residual: x, [M, D].
      coefficients: alpha, beta and gammas, float32 or wider [2 + k].
      down: A, [D, r], or None.
      up: B, [r, D], or None.
      norm_weight: [D], or None.
      previous: k earlier residuals, [M, D].
    """

    update: Tensor
    residual: Tensor
    coefficients: Tensor
    down: Tensor | None
    up: Tensor | None
    norm_weight: Tensor | None
    previous: Sequence[Tensor]

    @property
    def stream(self) -> torch.dtype:
        """The dtype of x'."""
        return stream_of(self.update, self.residual, self.previous)


class Made(NamedTuple):
    """What the forward pass makes.

    Attributes:
      total: x' in the dtype that holds update, residual and earlier ones, [M, D].
      low: x A, [M, r], or None.
      inverse: 1 / root mean square of x', [M, 1], or None.
      normed: [M, D] in the dtype of the update, or None.
      values: quantised normed values, [M, D], or None.
      scale: their scale, float32 [M, 1], or None.
    """

    total: Tensor
    low: Tensor | None = None
    inverse: Tensor | None = None
    normed: Tensor | None = None
    values: Tensor | None = None
    scale: Tensor | None = None


class Wanted(NamedTuple):
    """Which gradients somebody wants; of the coefficients, `alpha` alone needs the update, `gamma` the earlier ones."""

    update: bool
    residual: bool
    alpha: bool
    beta: bool
    gamma: bool
    maps: bool
    norm_weight: bool
    previous: bool


class Kept(NamedTuple):
    """What the backward pass is given; None where nobody wants what it is for.

    `dtypes` are those of update, residual and earlier residuals, and of their gradients.
    """

    dtypes: tuple[torch.dtype, ...]

    update: Tensor | None
    residual: Tensor | None
    coefficients: Tensor
    down: Tensor | None
    up: Tensor | None
    norm_weight: Tensor | None
    previous: Sequence[Tensor]
    total: Tensor | None
    low: Tensor | None
    inverse: Tensor | None

    @property
    def stream(self) -> torch.dtype:
        """The dtype of x'."""
        return functools.reduce(torch.promote_types, self.dtypes)


class Slopes(NamedTuple):
    """Gradients of x' and of its normalised form from above, [M, D]; either may be None, not both."""

    total: Tensor | None
    normed: Tensor | None


class Gradients(NamedTuple):
    """Gradients of the operands, None where nobody wants them; `previous` is empty then."""

    update: Tensor | None
    residual: Tensor | None
    coefficients: Tensor | None
    down: Tensor | None
    up: Tensor | None
    norm_weight: Tensor | None
    previous: Sequence[Tensor]


def stream_of(update: Tensor, residual: Tensor, previous: Sequence[Tensor] = ()) -> torch.dtype:
    """Give the dtype of a sum of rows: narrow updates, as autocast makes them, do not narrow what they are added to."""
    return functools.reduce(torch.promote_types, (x.dtype for x in (residual, *previous)), update.dtype)


def width_of(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype that is computed in: float32, or float64 for itself."""
    return torch.promote_types(dtype, torch.float32)
