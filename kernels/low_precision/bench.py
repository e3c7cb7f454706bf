"""What a benchmark runs of the 8-bit layers: a layer of a shape, its input, and a step of whatever replaces it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from distilbeam.kernels.low_precision.shapes import Shape


class Problem:
    """A linear layer, its input, and a gradient from above.

    Attributes:
      layer: a network of that layer alone, which candidates convert copies of.
      operations: of the three matrix products, forward and backward.
    """

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        """Draw the tensors of a shape from a fixed seed."""
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(shape.inputs, shape.outputs)).to(device=device, dtype=dtype)
        self.input = torch.randn(shape.rows, shape.inputs, device=device, dtype=dtype, requires_grad=True)
        self.above = torch.randn(shape.rows, shape.outputs, device=device, dtype=dtype)
        self.operations = 6 * shape.rows * shape.inputs * shape.outputs


def step(problem: Problem, layer: nn.Module) -> Callable[[], None]:
    """Give a function that takes a layer forward and backward, its weight quantised anew as after an optimizer's step."""
    leaves = [problem.input, *layer.parameters()]
    caches = [one.cache for one in layer.modules() if hasattr(one, "cache")]

    def take() -> None:
        for cache in caches:
            cache.clear()  # type: ignore[operator, union-attr]
        torch.autograd.grad(layer(problem.input), leaves, problem.above)

    return take
