"""Learned augmented residuals: a layer's output and input added by learned weights and maps.

    RW   alpha f + beta x,  (alpha, beta) = 2 softmax(w), w = 0 at the start
    LR   f + x + (x A) B,   A [D, r], B [r, D] = 0 at the start
    PA   f + x + sum_j gamma_j h_j(x_{i-j}),  gamma = 0 at the start, h the identity or a low-rank map of its own

and their combinations, e.g. RW+LR: alpha f + beta (x + (x A) B). Every one is the plain residual f + x at step 0.
Parameters per layer: RW 2, LR 2rD, PA k (+ 2rkD). None of them should have weight decay (`without_decay`).
Reference: Menghani et al., Learned Augmented Residual Layer, arXiv:2411.07501, sections 2 and 3; the bounded form of RW
and the start at zero of gamma are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distilbeam.kernels.laurel.interface import laurel_residual
from distilbeam.kernels.laurel.reference import residual_sum
from distilbeam.kernels.quantize.formats import QuantizedRows

PARTS = ("rw", "lr", "pa")


class LaurelResidual(nn.Module):
    """Add a layer's output to its input by a learned augmented residual.

    Args:
      dim: size D of the last dimension.
      variant: parts out of `rw`, `lr`, `pa`, joined by `+`; `plain` is f + x.
      rank: r of the low-rank maps.
      previous: how many earlier residuals `pa` adds.
      init: of A: `xavier` (vision), or `tiled` (language): 1/sqrt(rD) where i mod r = j, else 0.
      history: `pa`: earlier residuals are added as they are (`identity`) or through a low-rank map each (`low-rank`).

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> layer = LaurelResidual(1000, "rw+lr", rank=4)
      >>> sum(p.numel() for p in layer.parameters())
      8002
    """

    def __init__(
        self,
        dim: int,
        variant: str = "rw+lr",
        rank: int = 16,
        previous: int = 3,
        init: Literal["xavier", "tiled"] = "xavier",
        history: Literal["identity", "low-rank"] = "identity",
    ) -> None:
        super().__init__()
        parts = _parts(variant)
        for name, value in (("dim", dim), ("rank", rank), ("previous", previous)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if init not in ("xavier", "tiled"):
            raise ValueError(f"init must be 'xavier' or 'tiled', got {init!r}")
        if history not in ("identity", "low-rank"):
            raise ValueError(f"history must be 'identity' or 'low-rank', got {history!r}")
        self.variant, self.previous = variant, previous if "pa" in parts else 0
        self.balance = nn.Parameter(torch.zeros(2)) if "rw" in parts else None
        self.down = nn.Parameter(_down(dim, rank, init)) if "lr" in parts else None
        self.up = nn.Parameter(torch.zeros(rank, dim)) if "lr" in parts else None
        self.gamma = nn.Parameter(torch.zeros(previous)) if "pa" in parts else None
        mapped = "pa" in parts and history == "low-rank"
        # gamma is zero at the start: with B = 0 as well, neither would ever have a gradient
        self.history_down = _stack(lambda: _down(dim, rank, init), previous) if mapped else None
        self.history_up = _stack(lambda: _down(dim, rank, init).T, previous) if mapped else None

    def forward(self, update: Tensor, residual: Tensor, previous: Sequence[Tensor] = ()) -> Tensor:
        """Add up.

        Args:
          update: the layer's output f(x), [..., D].
          residual: the layer's input x, [..., D].
          previous: earlier residuals, the latest first, each [..., D]; `pa` takes as many as it has weights for, fewer
            near the network's input.

        Returns:
          The layer's residual output, [..., D].
        """
        learned = self._learned(previous)
        if torch.compiler.is_exporting():  # kernels choose by device and by the number of rows, a file cannot
            return residual_sum(update, residual, **learned).to(update.dtype)
        total: Tensor = laurel_residual(update, residual, **learned)
        return total

    def normed(
        self,
        update: Tensor,
        residual: Tensor,
        previous: Sequence[Tensor],
        norm_weight: Tensor,
        quantize: Literal["fp8", "int8"] | None,
    ) -> tuple[Tensor, Tensor | QuantizedRows]:
        """Add up and take the RMS norm of the sum in the same pass, in 8 bits where asked for; see `laurel_residual`."""
        made = laurel_residual(update, residual, norm_weight=norm_weight, quantize=quantize, **self._learned(previous))
        return made.residual, made.normed

    def _learned(self, previous: Sequence[Tensor]) -> dict[str, Any]:
        """Give the arguments of `laurel_residual` that are learned."""
        alpha, beta = (None, None) if self.balance is None else (2 * self.balance.softmax(0)).unbind()
        earlier = list(previous[: self.previous])
        gamma = None if self.gamma is None or not earlier else self.gamma[: len(earlier)]
        if self.history_down is not None and self.history_up is not None:
            earlier = [(x @ self.history_down[j]) @ self.history_up[j] for j, x in enumerate(earlier)]
        earlier = [] if gamma is None else earlier
        return {"alpha": alpha, "beta": beta, "down": self.down, "up": self.up, "previous": earlier, "gamma": gamma}

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        return f"variant={self.variant}"


def without_decay(module: nn.Module) -> set[nn.Parameter]:
    """Collect the parameters that weight decay must leave alone: learned residuals, biases and norms.

    Args:
      module: a student.

    Returns:
      The parameters.
    """
    exempt = {p for p in module.parameters() if p.ndim < 2}
    for part in module.modules():
        if isinstance(part, LaurelResidual):
            exempt.update(part.parameters())
    return exempt


def _parts(variant: str) -> tuple[str, ...]:
    parts = () if variant == "plain" else tuple(variant.split("+"))
    if len(set(parts)) < len(parts) or not set(parts) <= set(PARTS):
        raise ValueError(f"variant must be 'plain' or distinct parts out of rw, lr, pa joined by '+', got {variant!r}")
    return parts


def _down(dim: int, rank: int, init: str) -> Tensor:
    if init == "xavier":
        return nn.init.xavier_uniform_(torch.empty(dim, rank))
    row = torch.arange(dim)[:, None] % rank == torch.arange(rank)
    return row.float() / math.sqrt(rank * dim)


def _stack(make: object, count: int) -> nn.ParameterList:
    assert callable(make)
    return nn.ParameterList([nn.Parameter(make().contiguous()) for _ in range(count)])
