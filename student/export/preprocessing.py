"""The preprocessing that an export's graph carries: the scaling of numbers, and the scaling and resizing of pixels.

    numbers   x -> (x scale - mean) / std                                             tensor input
    pixels    uint8 [batch, height, width, channel] -> resized -> (x scale - mean) / std -> the student's layout

What a caller has to do before is an input configuration again, `GraphInput.config`: that of the student without what is in the
graph. Resizing is Pillow's: a triangle filter over the width, rounded, then over the height, rounded; single pixels differ
by 1 of 255 where Pillow's weights of 22 bits round the other way. Cutting the middle out (`resize = "crop"`) stays outside, as do
numbers that float32 would coarsen before their mean is subtracted (`FAR`). Text and ids have nothing that a graph holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from distilbeam.inputs.config import InputConfig, normalised
from distilbeam.student.checkpoint import Student
from distilbeam.student.networks.config import HUGGINGFACE

FAR = 1000.0  # |mean| / std from where float32 numbers are off by more than 6e-5 of a standard deviation
LONGEST = 2**16  # pixels of a side


@dataclass(frozen=True)
class GraphInput:
    """What the graph of an export takes.

    Attributes:
      module: the network behind its preprocessing.
      config: what has to be made of columns outside.
      shape: of one example; that of images without a resizing graph is fixed.
      dtype: of the numbers.
      sides: whether images of any height and width are taken.
      lengths: whether token ids of any length up to that of an example are taken, without padding.
      does: what the graph does, a sentence for each step.
    """

    module: nn.Module
    config: InputConfig
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sides: bool = False
    lengths: bool = False
    does: tuple[str, ...] = ()

    def zeros(self, rows: int) -> Tensor:
        """Make an input of zeros."""
        return torch.from_numpy(np.zeros((rows, *self.shape), self.dtype))

    @property
    def dimensions(self) -> dict[int, str]:
        """Names of the dimensions of any size."""
        more = {1: "height", 2: "width"} if self.sides else {1: "sequence"} if self.lengths else {}
        return {0: "batch", **more}

    @property
    def longest(self) -> dict[str, int]:
        """Greatest sizes of these dimensions, by their names."""
        return {"batch": 2**20, "height": LONGEST, "width": LONGEST, "sequence": self.shape[0]}

    def raw(self, inputs: npt.NDArray[Any], student: InputConfig) -> npt.NDArray[Any]:
        """Go back from a student's inputs [rows, ...] to what the graph takes: before scaling, nearly; pixels exactly."""
        if not self.does:
            return np.array(inputs, self.dtype, order="C")
        values = inputs.astype(np.float64)
        if student.kind == "image":
            values = values if student.layout == "hwc" else values.transpose(0, 2, 3, 1)
            values = _unscaled(values, student, 1 / 255)
            values = np.clip(np.rint(values) if self.dtype == np.uint8 else values, 0, 255)
        else:
            values = _unscaled(values.reshape(len(values), -1), student, 1.0).reshape(inputs.shape)
        return np.ascontiguousarray(values.astype(self.dtype))

    def inputs_of(self, raw: npt.NDArray[Any], student: InputConfig) -> npt.NDArray[Any]:
        """Make a student's inputs of what the graph takes, images being of the student's size already."""
        if not self.does:
            return raw
        if student.kind == "image":
            pixels_NHWC = normalised(raw, student, 1 / 255, "channel", raw.shape[-1])
            return np.ascontiguousarray(pixels_NHWC if student.layout == "hwc" else pixels_NHWC.transpose(0, 3, 1, 2))
        flat = raw.reshape(len(raw), -1)
        return normalised(flat, student, 1.0, "feature", flat.shape[1]).reshape(raw.shape)


def graph_input(student: Student, pixels: type[np.generic] = np.uint8) -> GraphInput:
    """Put as much of a student's preprocessing in front of its network as a graph can hold.

    Args:
      student: the student.
      pixels: type of the pixels that the graph takes.
    """
    config, shape = student.config.input, student.input_shape
    if config.kind == "image":
        return _image(student, config, np.dtype(pixels))
    plain = config.model_copy(update={"scale": None, "mean": (), "std": ()})
    if config.kind == "tensor" and config != plain and not _far(config):
        does = (f"numbers: {_formula(config, 1.0)}",)
        return GraphInput(Scaled(student.module, config), plain, shape, np.dtype(np.float32), does=does)
    lengths = student.config.kind == HUGGINGFACE and config.gives_ids  # whose networks know padding from text
    return GraphInput(student.module, config, shape, student.zeros(1).numpy().dtype, lengths=lengths)


class Scaled(nn.Module):
    """A network behind (x * scale - mean) / std, in the order and type of `distilbeam.inputs`."""

    def __init__(self, network: nn.Module, config: InputConfig, default_scale: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.mean: Tensor | None
        self.std: Tensor | None
        self.scale = default_scale if config.scale is None else config.scale
        for name, numbers in (("mean", config.mean), ("std", config.std)):
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32) if numbers else None)

    def scaled(self, x: Tensor) -> Tensor:
        """Scale numbers [..., channels] by the last axis."""
        x = x * self.scale if self.scale != 1 else x
        x = x if self.mean is None else x - self.mean
        return x if self.std is None else x / self.std

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of numbers [B, ...], which belong to mean and std by their place in an example."""
        logits: Tensor = self.network(self.scaled(x.flatten(1)).reshape(x.shape))
        return logits


class Pixels(Scaled):
    """A network behind the resizing and scaling of pixels [B, height, width, channel]."""

    def __init__(self, network: nn.Module, config: InputConfig, resized: bool) -> None:
        super().__init__(network, config, 1 / 255)
        self.size = config.size if resized else None
        self.channels_first = config.layout == "chw"

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the logits of pixels from 0 to 255."""
        x = pixels.float()
        if self.size is not None:
            x = x.permute(0, 3, 1, 2)
            for size in ([x.shape[2], self.size[1]], list(self.size)):
                x = torch.floor(functional.interpolate(x, size=size, mode="bilinear", antialias=True) + 0.5)
            x = x.permute(0, 2, 3, 1)
        x = self.scaled(x)
        logits: Tensor = self.network(x.permute(0, 3, 1, 2) if self.channels_first else x)
        return logits


def _image(student: Student, config: InputConfig, pixels: np.dtype[Any]) -> GraphInput:
    outside = config.model_copy(update={"scale": 1.0, "mean": (), "std": (), "layout": "hwc"})
    shape = student.input_shape if config.layout == "hwc" else (*student.input_shape[1:], student.input_shape[0])
    resized = config.size is not None and config.resize == "stretch"
    does = [f"images are resized to {config.size[0]} x {config.size[1]}"] if resized and config.size else []
    does.append(f"pixels from 0 to 255: {_formula(config, 1 / 255)}")
    does += ["channels are put first"] if config.layout == "chw" else []
    module = Pixels(student.module, config, resized)
    return GraphInput(module, outside, shape, pixels, resized, does=tuple(does))


def _far(config: InputConfig) -> bool:
    """Whether float32 is too coarse for numbers as they are stored."""
    least = min(config.std, default=1.0)
    scale = abs(1.0 if config.scale is None else config.scale)
    return max(map(abs, config.mean), default=0.0) > FAR * least or not 1e-12 < scale < 1e12


def _formula(config: InputConfig, default_scale: float) -> str:
    scale = default_scale if config.scale is None else config.scale
    return f"(x * {scale:.9g} - {list(config.mean) or 0}) / {list(config.std) or 1}"


def _unscaled(values: npt.NDArray[np.float64], config: InputConfig, default_scale: float) -> npt.NDArray[np.float64]:
    scale = default_scale if config.scale is None else config.scale
    scaled: npt.NDArray[np.float64] = values * np.asarray(config.std or 1.0) + np.asarray(config.mean or 0.0)
    return scaled / scale if scale else scaled
