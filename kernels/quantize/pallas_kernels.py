"""Rowwise quantisation as a Pallas kernel for TPUs, as a plain JAX function; see reference.py for the formula.

`scale_of` and `quantized` are also the end of the kernels that quantise what they make. A program holds some rows whole.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from distilbeam.kernels.quantize.formats import SCALE_FLOOR, Format

BLOCK_BYTES = 1 << 20  # of a block in float32, of which a program holds a few
LARGEST_FLOAT32 = 3.4028234663852886e38
JAX_DTYPES = {"torch.int8": jnp.int8, "torch.float8_e4m3fn": jnp.float8_e4m3fn, "torch.float8_e5m2": jnp.float8_e5m2}


def block_rows(dim: int) -> int:
    """Choose how many rows a block has: a multiple of the 32 that 8-bit tiles have."""
    return max(32, min(512, BLOCK_BYTES // (4 * dim) // 32 * 32))


def scale_of(x, target: Format):
    """Scale of each row of float32 [M, D]; NaN is passed over."""
    largest = jnp.where(x != x, 0.0, jnp.abs(x)).max(axis=1, keepdims=True)
    return jnp.maximum(jnp.minimum(largest, LARGEST_FLOAT32) * target.reciprocal, SCALE_FLOOR)


def quantized(x, scale, target: Format):
    """Values of float32 rows [M, D], and the scale to store, which is NaN for an int8 row that has a NaN."""
    absent = x != x
    scaled = jnp.clip(x * (1.0 / scale), -target.largest, target.largest)
    dtype = JAX_DTYPES[str(target.dtype)]
    if dtype == jnp.int8:
        has_nan = absent.astype(jnp.float32).max(axis=1, keepdims=True) > 0
        whole = jnp.round(jnp.where(absent, 0.0, scaled)).astype(jnp.int32)
        return whole.astype(jnp.int8), jnp.where(has_nan, jnp.nan, scale)
    return jnp.where(absent, jnp.nan, scaled).astype(dtype), scale


@functools.partial(jax.jit, static_argnames=("target", "interpret"))
def quantize(x: Any, target: Format, *, interpret: bool = False) -> tuple[Any, Any]:
    """Quantise each row.

    Args:
      x: floating [M, D].
      target: the format.
      interpret: run the kernel in Pallas' interpreter, on any device.

    Returns:
      Values [M, D] and scale, float32 [M, 1].
    """
    rows, dim = x.shape
    size = block_rows(dim)
    padded = jnp.pad(x, ((0, -rows % size), (0, 0)))
    block, column = pl.BlockSpec((size, dim), lambda i: (i, 0)), pl.BlockSpec((size, 1), lambda i: (i, 0))
    shapes = [
        jax.ShapeDtypeStruct(padded.shape, JAX_DTYPES[str(target.dtype)]),
        jax.ShapeDtypeStruct((padded.shape[0], 1), jnp.float32),
    ]
    call = pl.pallas_call(
        functools.partial(_kernel, target=target),
        grid=(padded.shape[0] // size,),
        in_specs=[block],
        out_specs=[block, column],
        out_shape=shapes,
        interpret=interpret,
    )
    values, scale = call(padded)
    return values[:rows], scale[:rows]


def _kernel(x, values, scale, *, target: Format):
    wide = x[...].astype(jnp.float32)
    values[...], scale[...] = quantized(wide, scale_of(wide, target), target)
