"""Fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from distilbeam.student.config import StudentConfig
from distilbeam.student.networks.joining import make_residual, scaled


class Mlp(nn.Module):
    """Linear layers with ReLU and dropout, and the logits; a layer that keeps its width joins its input.

    With input width D and hidden widths H1 ... Hn (each times `width`) it has (D + 1) H1 + ... + (Hn + 1) C parameters,
    and those of the residuals.
    """

    def __init__(
        self, inputs: int, config: StudentConfig, num_classes: int, init: Literal["xavier", "tiled"] = "xavier"
    ) -> None:
        super().__init__()
        widths = [inputs, *(scaled(width, config.width) for width in config.hidden)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        # the input itself is never added: only hidden states of one width are
        self.keeps = [i > 0 and a == b for i, (a, b) in enumerate(pairwise(widths))]
        runs = _run_lengths(self.keeps)
        self.residuals = nn.ModuleList(
            make_residual(config, width, run, init) if keep else nn.Identity()
            for keep, run, width in zip(self.keeps, runs, widths[1:], strict=True)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [B, C] of inputs [B, ...]."""
        h = x.flatten(1)
        earlier: list[Tensor] = []  # residuals of the width reached, the latest first
        for layer, residual, keeps in zip(self.layers, self.residuals, self.keeps, strict=True):
            update = self.dropout(torch.relu(layer(h)))
            if keeps:
                earlier, h = [h, *earlier], residual(update, h, earlier)
            else:
                earlier, h = [], update
        logits: Tensor = self.head(h)
        return logits


def _run_lengths(keeps: Sequence[bool]) -> list[int]:
    """Count the layers directly before each one that keep the width."""
    runs: list[int] = []
    for i in range(len(keeps)):
        runs.append(runs[-1] + 1 if i and keeps[i - 1] else 0)
    return runs
