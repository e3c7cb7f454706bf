"""Student networks: linear, mlp, the Survey's cnn with a width multiplier, or the user's own factory.

A network takes float32 inputs [B, *input_shape] and returns logits [B, C].
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from distilbeam.student.config import StudentConfig
from distilbeam.student.laurel import LaurelResidual


def build_student(config: StudentConfig, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Build an untrained student; its initial weights come from torch's global generator.

    Args:
      config: the student's configuration.
      input_shape: shape of one example's input.
      num_classes: number of classes C.

    Returns:
      A module from float32 [B, *input_shape] to logits [B, C].

    Raises:
      ValueError: the input does not suit the network, or the factory cannot be found or returns no module.

    Example:
      >>> from distilbeam.student.config import StudentConfig
      >>> config = StudentConfig(kind="linear", input={"columns": ["image"]})
      >>> count_parameters(build_student(config, (8, 8), 10))
      650
    """
    if config.kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))
    if config.kind == "mlp":
        return Mlp(math.prod(input_shape), config, num_classes)
    if config.kind == "cnn":
        return SurveyCnn(input_shape, config, num_classes)
    return _from_factory(config, input_shape, num_classes)


def count_parameters(module: nn.Module) -> int:
    """Count the numbers that training adjusts."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class Mlp(nn.Module):
    """Fully connected layers with ReLU; a layer that keeps its width can add its input."""

    def __init__(self, inputs: int, config: StudentConfig, num_classes: int) -> None:
        super().__init__()
        widths = [inputs, *config.hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        # the input itself is never added: only hidden states of one width are
        keeps = [i > 0 and a == b for i, (a, b) in enumerate(pairwise(widths))]
        self.residuals = nn.ModuleList(
            _residual(config, width) if keep else nn.Identity()
            for keep, width in zip(keeps, config.hidden, strict=True)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [B, C] of inputs [B, ...]."""
        h = x.flatten(1)
        earlier: list[Tensor] = []  # residuals of the width reached, the latest first
        for layer, residual in zip(self.layers, self.residuals, strict=True):
            update = self.dropout(torch.relu(layer(h)))
            if isinstance(residual, LaurelResidual):
                earlier, h = [h, *earlier], residual(update, h, earlier)
            else:
                earlier, h = [], update
        logits: Tensor = self.head(h)
        return logits


class SurveyCnn(nn.Module):
    """The convolutional network of the Survey's experiment (arXiv:2106.08962), without its softmax.

    Three pairs of Conv3x3-ReLU-BatchNorm with 32, round(64 w) and round(128 w) channels and a max-pool after each pair,
    then dropout, a dense layer of round(512 w) with ReLU, dropout, and the logits. The second convolution of a pair
    keeps its width and can add its input.
    """

    def __init__(self, input_shape: tuple[int, ...], config: StudentConfig, num_classes: int) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape[1:]) < 8:
            raise ValueError(
                "a cnn needs inputs of shape [channels, height, width] of at least 8 x 8 pixels, "
                f"got {list(input_shape)}"
            )
        channels = [input_shape[0], 32, max(1, round(64 * config.width)), max(1, round(128 * config.width))]
        pairs = pairwise(channels)
        self.pairs = nn.Sequential(*(_ConvPair(a, b, _residual(config, b)) for a, b in pairs))
        pixels = math.prod(size // 8 for size in input_shape[1:])
        dense = max(1, round(512 * config.width))
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(config.dropout),
            nn.Linear(channels[-1] * pixels, dense),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(dense, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [B, C] of images [B, channels, height, width]."""
        logits: Tensor = self.head(self.pairs(x))
        return logits


class _ConvPair(nn.Module):
    def __init__(self, inputs: int, outputs: int, residual: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](torch.relu(self.first(x)))
        update = self.norms[1](torch.relu(self.second(x)))
        if isinstance(self.residual, LaurelResidual):  # its maps act on channels, which it expects last
            update = self.residual(update.movedim(1, -1), x.movedim(1, -1)).movedim(-1, 1)
        return nn.functional.max_pool2d(update, 2)


def _residual(config: StudentConfig, dim: int) -> nn.Module:
    if config.residual == "none":
        return nn.Identity()
    return LaurelResidual(dim, config.residual.removeprefix("laurel-"), config.rank, config.previous)


def _from_factory(config: StudentConfig, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    name, _, attribute = config.kind.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"student kind {config.kind!r} cannot be found: {e}") from e
    module = factory(input_shape=input_shape, num_classes=num_classes, **config.options)
    if not isinstance(module, nn.Module):
        raise ValueError(f"student factory {config.kind!r} must return a torch module, got {type(module).__name__}")
    return module
