"""Rowwise quantisation through the Pallas kernel, on tensors that JAX can share; imported when it is chosen."""

from __future__ import annotations

from typing import Any

import jax
import torch
import torch.utils.dlpack
from torch import Tensor

from distilbeam.kernels.quantize import pallas_kernels
from distilbeam.kernels.quantize.formats import FORMAT_OF, Format
from distilbeam.kernels.resolve import interpreting_pallas


def quantize(x: Tensor, target: Format) -> tuple[Tensor, Tensor]:
    """Quantise each row; see `reference.quantize`."""
    rows_MD = x.reshape(-1, x.shape[-1])
    if not rows_MD.numel():
        return torch.empty(x.shape, dtype=target.dtype), torch.empty(*x.shape[:-1], 1)
    values, scale = pallas_kernels.quantize(to_jax(rows_MD), target, interpret=interpreting_pallas())
    return to_torch(values).reshape(x.shape), to_torch(scale).reshape(*x.shape[:-1], 1)


def to_jax(tensor: Tensor) -> Any:
    """Share a tensor with JAX; 8-bit floating values cross as bytes."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype in FORMAT_OF and tensor.dtype != torch.int8:
        wanted = pallas_kernels.JAX_DTYPES[str(tensor.dtype)]
        return jax.lax.bitcast_convert_type(jax.dlpack.from_dlpack(tensor.view(torch.uint8)), wanted)
    return jax.dlpack.from_dlpack(tensor)


def to_torch(array: Any) -> Tensor:
    """Share an array with torch."""
    name = str(array.dtype)
    narrow = name.startswith("float8")
    if narrow:
        array = jax.lax.bitcast_convert_type(array, "uint8")
    tensor: Tensor = torch.utils.dlpack.from_dlpack(array.block_until_ready())
    return tensor.view(getattr(torch, name)) if narrow else tensor
