"""Fully connected layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from distilbeam.kernels.laurel.operands import EPSILON
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.networks.last_layer import LastLayerApart
from distilbeam.student.networks.residual import Normed, join_and_norm, make_residual, scaled, wide_stream


class Mlp(LastLayerApart):
    """Linear layers with ReLU and dropout, and the logits; a layer that keeps its width joins its input.

    With input width D and hidden widths H1 ... Hn (each times `width`) it has (D + 1) H1 + ... + (Hn + 1) C parameters,
    and those of the residuals. With `norm` rms there is an RMS norm in front of every layer but the first, computed with the
    residual before it in one pass.
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
        rms = config.norm == "rms"
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=EPSILON) for width in widths[1:] if rms)
        # hidden states that later ones are added to
        self.begins = [not keep and after for keep, after in pairwise([*self.keeps, False])]
        if config.residual == "none":
            self.begins = [False] * len(self.keeps)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute what the last layer is given, [B, H], of inputs [B, ...]."""
        h = x.flatten(1)
        normed: Normed = h  # what the next layer reads
        earlier: list[Tensor] = []  # residuals of the width reached, the latest first
        readers = [*self.layers[1:], None]
        for i, (layer, residual, keeps) in enumerate(zip(self.layers, self.residuals, self.keeps, strict=True)):
            update = self.dropout(torch.relu(layer(normed)))
            if not keeps:
                earlier, h = [], wide_stream(update) if self.begins[i] else update
                normed = self.norms[i](h) if self.norms else h
            elif self.norms:
                joined = join_and_norm(residual, update, h, earlier, self.norms[i], readers[i])
                earlier, (h, normed) = [h, *earlier], joined
            else:
                earlier, h = [h, *earlier], residual(update, h, earlier)
                normed = h
        assert isinstance(normed, Tensor)
        return normed

    def last_layer(self) -> nn.Linear:
        """Give the layer to the logits."""
        return self.head


def _run_lengths(keeps: Sequence[bool]) -> list[int]:
    """Count the layers directly before each one that keep the width."""
    runs: list[int] = []
    for i in range(len(keeps)):
        runs.append(runs[-1] + 1 if i and keeps[i - 1] else 0)
    return runs
