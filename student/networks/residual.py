"""How a layer's output joins its input: it replaces it, or is added to it, plainly or by a learned residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from distilbeam.kernels.conversion.layers import LowPrecisionLinear
from distilbeam.kernels.laurel.interface import laurel_residual
from distilbeam.kernels.quantize.formats import QuantizedRows
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.networks.laurel import LaurelResidual

Normed = Tensor | QuantizedRows


class Replacement(nn.Module):
    """Gives a layer's output alone, with the arguments of a residual."""

    def forward(self, update: Tensor, residual: Tensor, previous: Sequence[Tensor] = ()) -> Tensor:  # noqa: ARG002
        """Return the update."""
        return update

    def normed(
        self,
        update: Tensor,
        residual: Tensor,  # noqa: ARG002
        previous: Sequence[Tensor],  # noqa: ARG002
        norm_weight: Tensor,
        quantize: Literal["fp8", "int8"] | None,
    ) -> tuple[Tensor, Normed]:
        """Return the update and its RMS norm."""
        made = laurel_residual(update, update, beta=0.0, norm_weight=norm_weight, quantize=quantize)
        return made.residual, made.normed


def join_and_norm(
    residual: nn.Module,
    update: Tensor,
    x: Tensor,
    previous: Sequence[Tensor],
    norm: nn.Module,
    reader: object,
) -> tuple[Tensor, Normed]:
    """Join a layer's output to its input and norm the result, in one pass.

    Args:
      residual: how to join; from `make_residual`.
      update: the layer's output, [..., D].
      x: its input.
      previous: earlier residuals, the latest first.
      norm: a torch RMSNorm, of which the weight is taken.
      reader: the layer that reads the normed form; a linear one that runs in 8 bits is given its rows in them.

    Returns:
      What is joined, and its normed form in the dtype of the update or in 8 bits.
    """
    assert isinstance(residual, LaurelResidual | Replacement)
    assert isinstance(norm, nn.RMSNorm)
    quantize = reader.precision if isinstance(reader, LowPrecisionLinear) else None
    return residual.normed(update, x, previous, norm.weight, quantize)


def make_residual(
    config: StudentConfig, dim: int, earlier: int, init: Literal["xavier", "tiled"] = "xavier"
) -> LaurelResidual | Replacement:
    """Make what joins a layer's output to its input of the same width.

    Args:
      config: the student's configuration.
      dim: the width.
      earlier: how many earlier residuals of this width there are; without one, `pa` is left out, and it has no more
        weights than there are residuals, because a weight without a gradient stops data-parallel training.
      init: of low-rank maps: `xavier` (vision) or `tiled` (language).

    Returns:
      A module of (update, residual, previous).
    """
    if config.residual == "none":
        return Replacement()
    parts = config.residual.removeprefix("laurel-").split("+")
    variant = "+".join(part for part in parts if part != "pa" or earlier) or "plain"
    previous = max(1, min(config.previous, earlier))
    return LaurelResidual(dim, variant, config.rank, previous, init, config.history)


def join_channels(residual: nn.Module, update: Tensor, x: Tensor, previous: Sequence[Tensor] = ()) -> Tensor:
    """Join images [B, channels, height, width]: a residual's maps act on channels, which it expects last."""
    joined: Tensor = residual(update.movedim(1, -1), x.movedim(1, -1), [image.movedim(1, -1) for image in previous])
    return joined.movedim(-1, 1)


def wide_stream(x: Tensor) -> Tensor:
    """Begin a residual stream: what autocast narrowed is widened, so that no later sum is rounded to its few digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scaled(size: int, width: float) -> int:
    """Multiply a number of channels or hidden units by the width, at least 1."""
    return max(1, round(size * width))


def channels_last(images: Tensor) -> Tensor:
    """Lay images out with their channels last in memory, which convolutions and residuals on a CPU read faster."""
    return images.contiguous(memory_format=torch.channels_last)
