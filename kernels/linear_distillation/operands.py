"""What the fused last layer multiplies, in the operands' own dtype or in fewer bits, and what stands for it in autograd."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distilbeam.kernels.quantize.formats import QuantizedRows
from distilbeam.kernels.quantize.interface import dequantize_rowwise


class Operands(NamedTuple):
    """The numbers of a last layer.

    Attributes:
      hidden: its inputs, [B, H].
      weight: its weight, [C, H].
      bias: its bias, [C], or None.
      hidden_scale: factor of each row of 8-bit inputs, float32 [B, 1], or None.
      weight_scale: factor of each row of an 8-bit weight, float32 [C, 1]; given together with `hidden_scale`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    hidden_scale: Tensor | None = None
    weight_scale: Tensor | None = None

    def part(self, classes: slice) -> Operands:
        """Take the layer of some classes."""
        bias = None if self.bias is None else self.bias[classes]
        scale = None if self.weight_scale is None else self.weight_scale[classes]
        return Operands(self.hidden, self.weight[classes], bias, self.hidden_scale, scale)

    def some_rows(self, rows: slice) -> Operands:
        """Take the layer of some rows of the inputs."""
        scale = None if self.hidden_scale is None else self.hidden_scale[rows]
        return self._replace(hidden=self.hidden[rows], hidden_scale=scale)

    def wide_hidden(self, dtype: torch.dtype) -> Tensor:
        """Give the inputs in the dtype of a computation."""
        return _wide(self.hidden, self.hidden_scale, dtype)

    def wide_weight(self, dtype: torch.dtype) -> Tensor:
        """Give the weight in the dtype of a computation."""
        return _wide(self.weight, self.weight_scale, dtype)


class Layer(NamedTuple):
    """A last layer as a call gives it.

    Attributes:
      hidden: inputs [B, H], or their rows in fewer bits.
      weight: weight [C, H], likewise.
      bias: floating [C], or None.
    """

    hidden: Tensor | QuantizedRows
    weight: Tensor | QuantizedRows
    bias: Tensor | None

    @property
    def operands(self) -> Operands:
        """The numbers, without gradients where they are rows in fewer bits."""
        return Operands(_values(self.hidden), _values(self.weight), self.bias, _scale(self.hidden), _scale(self.weight))

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the gradients of the three go to."""
        return _leaf(self.hidden), _leaf(self.weight), self.bias

    def widened(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Give the same numbers as differentiable float tensors."""
        hidden, weight = (x if isinstance(x, Tensor) else dequantize_rowwise(x) for x in (self.hidden, self.weight))
        return hidden, weight, self.bias

    def rows(self, index: Tensor) -> Layer:
        """Take some rows of the inputs."""
        return self._replace(hidden=rows_of(self.hidden, index))

    def without(self, absent: Tensor) -> Layer:
        """Put zeros in the place of some rows of the inputs, bool [B]; their gradient is zero."""
        absent_B1, x = absent[:, None], self.hidden
        if isinstance(x, Tensor):
            return self._replace(hidden=x.masked_fill(absent_B1, 0))
        kind = x.values.dtype
        bits = x.values if kind.itemsize > 1 else x.values.view(torch.uint8)  # zero is zero in every format
        straight = None if x.straight is None else x.straight.masked_fill(absent_B1, 0)
        rows = QuantizedRows(bits.masked_fill(absent_B1, 0).view(kind), x.scale.masked_fill(absent_B1, 1), straight)
        return self._replace(hidden=rows)


def rows_of(x: Tensor | QuantizedRows, index: Tensor) -> Tensor | QuantizedRows:
    """Take some rows."""
    if isinstance(x, Tensor):
        return x[index]
    return QuantizedRows(x.values[index], x.scale[index], None if x.straight is None else x.straight[index])


def _wide(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if scale is None:
        return values.to(dtype)
    if dtype not in (torch.bfloat16, torch.float32):
        return (values.float() * scale).to(dtype)
    held = values.to(dtype)  # which bfloat16 does exactly, so that only the product is rounded
    return torch.mul(held, scale, out=held)


def _values(x: Tensor | QuantizedRows) -> Tensor:
    return x if isinstance(x, Tensor) else x.values


def _scale(x: Tensor | QuantizedRows) -> Tensor | None:
    """Give the scale of 8-bit rows; bfloat16 needs none."""
    return x.scale if isinstance(x, QuantizedRows) and x.values.dtype.itemsize == 1 else None


def _leaf(x: Tensor | QuantizedRows) -> Tensor:
    if isinstance(x, Tensor):
        return x
    return x.scale.new_zeros(()).expand(x.shape) if x.straight is None else x.straight
