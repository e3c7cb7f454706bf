"""The convolutional network of the Survey's experiment."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.networks.last_layer import LastLayerApart
from distilbeam.student.networks.residual import channels_last, join_channels, make_residual, scaled


class SurveyCnn(LastLayerApart):
    """The network of the Survey's experiment (Menghani, arXiv:2106.08962), without its softmax.

    Three pairs of Conv3x3-ReLU-BatchNorm with 32, round(64 w) and round(128 w) channels and a max-pool after each pair,
    then dropout, a dense layer of round(512 w) with ReLU, dropout, and the logits. The second convolution of a pair
    keeps its width and can join its input.
    """

    def __init__(self, input_shape: tuple[int, ...], config: StudentConfig, num_classes: int) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape[1:]) < 8:
            raise ValueError(
                "a cnn needs inputs of shape [channels, height, width] of at least 8 x 8 pixels, "
                f"got {list(input_shape)}"
            )
        channels = [input_shape[0], 32, scaled(64, config.width), scaled(128, config.width)]
        self.pairs = nn.Sequential(
            *(_ConvPair(a, b, make_residual(config, b, earlier=0)) for a, b in pairwise(channels))
        )
        pixels = math.prod(size // 8 for size in input_shape[1:])
        dense = scaled(512, config.width)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(config.dropout),
            nn.Linear(channels[-1] * pixels, dense),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(dense, num_classes),
        )

    def features(self, x: Tensor) -> Tensor:
        """Compute what the last dense layer is given, [B, H], of images [B, channels, height, width]."""
        hidden: Tensor = self.head[:-1](self.pairs(channels_last(x)))
        return hidden

    def last_layer(self) -> nn.Linear:
        """Give the layer to the logits."""
        layer = self.head[-1]
        assert isinstance(layer, nn.Linear)
        return layer


class _ConvPair(nn.Module):
    def __init__(self, inputs: int, outputs: int, residual: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](torch.relu(self.first(x)))
        update = self.norms[1](torch.relu(self.second(x)))
        return nn.functional.max_pool2d(join_channels(self.residual, update, x), 2)
