"""The product of two 8-bit matrices as a Pallas kernel for TPUs, scaled by rows as it is stored.

The 8-bit operands go to the matrix unit as they are, int8 with int32 sums: v5e and v6e multiply int8 natively and fp8
through wider types, v7x the other way round. The sum over K stays in a block of memory until it is complete.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

BLOCK = {"m": 256, "n": 256, "k": 512}


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def scaled_product(
    a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any, dtype: str, *, interpret: bool = False
) -> Any:
    """Multiply a by b transposed.

    Args:
      a: int8 or float8 [M, K].
      b: the same [N, K].
      scale_a: float32 [M, 1].
      scale_b: float32 [1, N].
      bias: float32 [1, N].
      dtype: of the result.
      interpret: run the kernel in Pallas' interpreter, on any device.

    Returns:
      (a scale_a) (b scale_b)^T + bias, [M, N].
    """
    rows, outputs = a.shape[0], b.shape[0]
    a, b = _padded(a, "m", "k"), _padded(b, "n", "k")
    scale_a = jnp.pad(scale_a, ((0, a.shape[0] - rows), (0, 0)))
    across = ((0, 0), (0, b.shape[0] - outputs))
    m, n, k = (BLOCK[axis] for axis in "mnk")
    sums = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    call = pl.pallas_call(
        functools.partial(_kernel, last=a.shape[1] // k - 1),
        grid=(a.shape[0] // m, b.shape[0] // n, a.shape[1] // k),
        in_specs=[_block((m, k), 0, 2), _block((n, k), 1, 2), _block((m, 1), 0, None), *[_block((1, n), None, 1)] * 2],
        out_specs=_block((m, n), 0, 1),
        out_shape=jax.ShapeDtypeStruct((a.shape[0], b.shape[0]), dtype),
        scratch_shapes=[pltpu.VMEM((m, n), sums)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )
    return call(a, b, scale_a, jnp.pad(scale_b, across), jnp.pad(bias, across))[:rows, :outputs]


def _block(shape: tuple[int, int], *axes: int | None):
    """Give the block whose place along each dimension is the program's along that axis of the grid."""
    return pl.BlockSpec(shape, lambda *step: tuple(0 if axis is None else step[axis] for axis in axes))


def _kernel(a, b, scale_a, scale_b, bias, out, total, *, last: int):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros(total.shape, total.dtype)

    contraction = (((1,), (1,)), ((), ()))
    total[...] += jax.lax.dot_general(a[...], b[...], contraction, preferred_element_type=total.dtype)

    @pl.when(step == last)
    def _():
        whole = total[...].astype(jnp.float32) * scale_a[...] * scale_b[...] + bias[...]
        out[...] = whole.astype(out.dtype)


def _padded(x, rows: str, inner: str):
    pads = ((0, -x.shape[0] % BLOCK[rows]), (0, -x.shape[1] % BLOCK[inner]))
    if x.dtype == jnp.int8:
        return jnp.pad(x, pads)
    padded = jnp.pad(jax.lax.bitcast_convert_type(x, jnp.uint8), pads)  # zero is zero in every format
    return jax.lax.bitcast_convert_type(padded, x.dtype)
