"""A linear layer that runs in 8 bits and is otherwise torch's own."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from distilbeam.kernels.low_precision.autograd import Gradients
from distilbeam.kernels.low_precision.interface import chosen, fp8_linear, int8_linear
from distilbeam.kernels.low_precision.weights import WeightCache
from distilbeam.kernels.quantize.formats import QuantizedRows


class LowPrecisionLinear(nn.Linear):
    """`torch.nn.Linear` with products in 8 bits; names, parameters and state are those of torch's layer.

    Args:
      layer: the layer to replace, whose parameters it shares.
      dtype: `fp8` or `int8`.
      gradients: see `fp8_linear`.
    """

    def __init__(self, layer: nn.Linear, dtype: Literal["fp8", "int8"], gradients: Gradients) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self.precision: Literal["fp8", "int8"] = dtype
        self.gradients, self.cache = gradients, WeightCache()
        self.train(layer.training)

    @property
    def product(self) -> str:
        """The implementation of its products where it is, of a batch in bfloat16."""
        return chosen(self.precision, self.weight, self.gradients)

    def forward(self, input: Tensor | QuantizedRows) -> Tensor:  # noqa: A002 - the name in torch.nn.Linear
        """Apply the layer; under autocast the input is brought to its dtype, as torch's layer would.

        Rows that the operation before has quantised, in the layer's own precision, are taken as they are.
        """
        if isinstance(input, Tensor) and torch.is_autocast_enabled(kind := input.device.type):
            input = input.to(torch.get_autocast_dtype(kind))  # noqa: A001
        if self.precision == "fp8":
            return fp8_linear(input, self.weight, self.bias, gradients=self.gradients, cache=self.cache)
        return int8_linear(input, self.weight, self.bias, cache=self.cache)

    def extra_repr(self) -> str:
        """Describe the layer in a printed model."""
        return f"{super().extra_repr()}, precision={self.precision}"
