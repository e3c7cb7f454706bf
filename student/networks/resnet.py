"""Residual networks in their CIFAR form.

A 3x3 convolution, three stages of n blocks with 16 w, 32 w and 64 w channels at full, half and quarter resolution, the
mean over the pixels, and the logits: 6n + 2 layers. A block is conv3x3-BN-ReLU-conv3x3-BN, joined to its input, ReLU.
Where a stage begins with more channels, every second pixel of the input is added and the new channels get zeros, which
has no parameters (He et al.'s option A). For width 1, 10 classes and depth 20 there are 269,722 parameters.

With a, b the channels before and after it, a convolution has 9ab parameters; a depthwise-separable one, 3x3 in each
channel and then 1x1 across them with nothing between (Chollet, arXiv:1610.02357), 9a + ab.
References: He et al., Deep Residual Learning for Image Recognition, arXiv:1512.03385, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.networks.last_layer import LastLayerApart
from distilbeam.student.networks.residual import channels_last, join_channels, make_residual, scaled


class ResNet(LastLayerApart):
    """The residual network of a configuration's `depth`, `width`, `separable` and `residual`."""

    def __init__(self, input_shape: tuple[int, ...], config: StudentConfig, num_classes: int) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(f"a resnet needs inputs of shape [channels, height, width], got {list(input_shape)}")
        channels = [scaled(size, config.width) for size in (16, 32, 64)]
        self.stem = nn.Conv2d(input_shape[0], channels[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels[0])
        blocks: list[_Block | _Transition] = []
        for stage, outputs in enumerate(channels):
            if stage:
                blocks.append(_Transition(channels[stage - 1], outputs, config))
            kept = config.depth // 6 - (stage > 0)
            blocks += [_Block(outputs, config, earlier) for earlier in range(kept)]
        self.blocks = nn.ModuleList(blocks)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(channels[-1], num_classes)
        self.apply(_initialise)

    def features(self, x: Tensor) -> Tensor:
        """Compute the mean over the pixels, [B, H], of images [B, channels, height, width]."""
        x = torch.relu(self.norm(self.stem(channels_last(x))))
        earlier: list[Tensor] = []  # inputs of this stage's blocks, the latest first
        for block in self.blocks:
            before = x
            x = block(x, earlier)
            earlier = [] if isinstance(block, _Transition) else [before, *earlier]
        mean: Tensor = self.dropout(x.mean((2, 3)))
        return mean

    def last_layer(self) -> nn.Linear:
        """Give the layer from the mean to the logits."""
        return self.head


class _Block(nn.Module):
    """Two convolutions that keep channels and resolution."""

    def __init__(self, channels: int, config: StudentConfig, earlier: int) -> None:
        super().__init__()
        self.layers = _layers(channels, channels, 1, config.separable)
        self.residual = make_residual(config, channels, earlier)

    def forward(self, x: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        return torch.relu(join_channels(self.residual, self.layers(x), x, earlier))


class _Transition(nn.Module):
    """Two convolutions that halve the resolution and add channels."""

    def __init__(self, inputs: int, outputs: int, config: StudentConfig) -> None:
        super().__init__()
        self.layers = _layers(inputs, outputs, 2, config.separable)
        self.new_channels = outputs - inputs
        self.adds_input = config.residual != "none"

    def forward(self, x: Tensor, earlier: Sequence[Tensor]) -> Tensor:  # noqa: ARG002 - the signature of a block
        update: Tensor = self.layers(x)
        if self.adds_input:
            before = self.new_channels // 2
            padding = (0, 0, 0, 0, before, self.new_channels - before)
            update = update + nn.functional.pad(x[:, :, ::2, ::2], padding)
        return torch.relu(update)


def _layers(inputs: int, outputs: int, stride: int, separable: bool) -> nn.Sequential:
    return nn.Sequential(
        *_convolution(inputs, outputs, stride, separable),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        *_convolution(outputs, outputs, 1, separable),
        nn.BatchNorm2d(outputs),
    )


def _convolution(inputs: int, outputs: int, stride: int, separable: bool) -> list[nn.Conv2d]:
    if not separable:
        return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)]
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
    return [depthwise, nn.Conv2d(inputs, outputs, 1, bias=False)]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
