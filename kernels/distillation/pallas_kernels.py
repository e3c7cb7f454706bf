"""The distillation losses of given logits as Pallas kernels for TPUs, as plain JAX functions.

    logit_buckets     logits of the kept classes, and the rest's logit: tau * logsumexp(z / tau) over the classes not kept
    logit_gradient    of the logits, from the gradients of the buckets

Buckets are given relative to the row's largest logit, and the rest as its largest logit and a sum, so that an offset that
all logits of a row share takes no digits from any of them.

A program holds BLOCK_ROWS rows of BLOCK_CLASSES classes. Which classes a row keeps is a bit in a word of 32 rows, so
that a word spreads over sublanes; the few kept logits are gathered, and their gradients scattered, by XLA, whose scatter
into bfloat16 holds the gradient once in float32.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

BLOCK_ROWS = 256  # eight words of bits, the fewest that a block may have
BLOCK_CLASSES = 1024
NOTHING = -jnp.inf


def logit_buckets(logits: Any, classes: Any, tau: float, *, interpret: bool = False) -> tuple[Any, Any, Any, Any]:
    """Compute the logits of the buckets.

    Args:
      logits: float32 or bfloat16 [B, C].
      classes: int32 [B, K]; padding repeats another of its row.
      tau: temperature of the rest bucket.
      interpret: run the kernel in Pallas' interpreter, on any device.

    Returns:
      Logits of the kept classes [B, K] and of the rest [B, 1], relative to the row's largest; the rest's largest logit
      [B, 1], and the sum of exp((z - largest) / tau) over the rest [B, 1]. float32; the rest and its largest are -inf
      where a row keeps every class.
    """
    rows, count = logits.shape
    kept = jnp.take_along_axis(logits, classes, axis=1).astype(jnp.float32)
    top, total = (x[:rows] for x in _rest(padded_rows(logits, 0), bits_of(classes, 0, count), tau, interpret))
    largest = jnp.maximum(top, kept.max(axis=1, keepdims=True))
    largest = jnp.where(largest == NOTHING, 0.0, largest)
    return kept - largest, jnp.where(total > 0, top - largest + tau * jnp.log(total), NOTHING), top, total


def logit_gradient(
    logits: Any, classes: Any, kept: Any, slope: Any, top: Any, tau: float, *, interpret: bool = False
) -> Any:
    """Compute the gradient of the logits.

    Args:
      logits: [B, C].
      classes: int32 [B, K], as for `logit_buckets`.
      kept: gradient of the kept classes' logits, to be added up by class, float32 [B, K].
      slope: gradient of the rest's logit divided by the rest's sum, float32 [B, 1]; a row where it is 0 may hold NaN.
      top: the rest's largest logit, float32 [B, 1], +inf where it is empty.
      tau: temperature of the rest bucket.
      interpret: run the kernel in Pallas' interpreter, on any device.

    Returns:
      [B, C], of the dtype of the logits.
    """
    rows, count = logits.shape
    columns = padded_rows(slope, 0), padded_rows(top, jnp.inf)
    spread = _spread(padded_rows(logits, 0), bits_of(classes, 0, count), *columns, tau, interpret)[:rows]
    # entries of one class are added before they are rounded: what cancels would leave the rounding
    same = classes[:, :, None] == classes[:, None, :]
    total = jnp.where(same, kept[:, None, :], 0.0).sum(axis=2)
    return spread.at[jnp.arange(rows)[:, None], classes].set(total.astype(logits.dtype))


def _rest_kernel(logits, bits, top, total, *, classes: int, tau: float):
    @pl.when(pl.program_id(1) == 0)
    def _():
        top[...] = jnp.full(top.shape, NOTHING, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    z = without_kept(logits[...].astype(jnp.float32), bits[...], pl.program_id(1), classes)
    before = top[...]
    higher = jnp.maximum(before, z.max(axis=1, keepdims=True))
    safe = jnp.where(higher == NOTHING, 0.0, higher)
    total[...] = total[...] * jnp.exp((before - safe) / tau) + jnp.exp((z - safe) / tau).sum(axis=1, keepdims=True)
    top[...] = higher


def _spread_kernel(logits, bits, slope, top, out, *, classes: int, tau: float):
    z = without_kept(logits[...].astype(jnp.float32), bits[...], pl.program_id(1), classes)
    nothing = (z == NOTHING) | (slope[...] == 0)
    out[...] = jnp.where(nothing, 0.0, slope[...] * jnp.exp((z - top[...]) / tau)).astype(out.dtype)


@functools.partial(jax.jit, static_argnames=("tau", "interpret"))
def _rest(logits, bits, tau: float, interpret: bool):
    grid, (block, words, column) = _layout(logits)
    shape = jax.ShapeDtypeStruct((logits.shape[0], 1), jnp.float32)
    kernel = functools.partial(_rest_kernel, classes=logits.shape[1], tau=tau)
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[block, words],
        out_specs=[column, column],
        out_shape=[shape, shape],
        interpret=interpret,
    )
    return call(logits, bits)


@functools.partial(jax.jit, static_argnames=("tau", "interpret"))
def _spread(logits, bits, slope, top, tau: float, interpret: bool):
    grid, (block, words, column) = _layout(logits)
    kernel = functools.partial(_spread_kernel, classes=logits.shape[1], tau=tau)
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[block, words, column, column],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(logits.shape, logits.dtype),
        interpret=interpret,
    )
    return call(logits, bits, slope, top)


def _layout(logits):
    """Grid, and blocks of logits, bits and columns; the second axis of the grid is the one summed over."""
    rows, classes = logits.shape
    size = min(BLOCK_CLASSES, classes)
    specs = [
        pl.BlockSpec((BLOCK_ROWS, size), lambda row, block: (row, block)),
        pl.BlockSpec((BLOCK_ROWS // 32, size), lambda row, block: (row, block)),
        pl.BlockSpec((BLOCK_ROWS, 1), lambda row, _: (row, 0)),
    ]
    return (rows // BLOCK_ROWS, pl.cdiv(classes, size)), specs


def without_kept(z, bits, block: Any, classes: int):
    """Put -inf in a block of logits where a class is kept or does not exist."""
    words, size = bits.shape
    shift = jax.lax.broadcasted_iota(jnp.int32, (words, 32, size), 1)
    kept = (jax.lax.shift_right_logical(jnp.broadcast_to(bits[:, None, :], shift.shape), shift) & 1).reshape(z.shape)
    number = block * size + jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
    return jnp.where((kept == 0) & (number < classes), z, NOTHING)


def padded_rows(value, fill):
    """Add rows up to a whole number of blocks."""
    return jnp.pad(value, ((0, -value.shape[0] % BLOCK_ROWS), (0, 0)), constant_values=fill)


def first_of_its_kind(classes):
    """Say which entries repeat no earlier one of their row, bool [B, K]."""
    entry = jnp.arange(classes.shape[1])
    earlier = entry[None, :] < entry[:, None]
    return ~((classes[:, :, None] == classes[:, None, :]) & earlier).any(axis=2)


def bits_of(classes, first: int, size: int):
    """Bit i mod 32 of word [i // 32, j] is set when row i keeps class first + j; int32 [rows / 32, size]."""
    rows = classes.shape[0]
    words = (rows + -rows % BLOCK_ROWS) // 32
    row = jnp.arange(rows)[:, None]
    counts = (classes >= first) & (classes < first + size) & first_of_its_kind(classes)
    column = jnp.where(counts, classes - first, size)  # past the end: dropped
    bit = jnp.left_shift(jnp.int32(1), (row % 32).astype(jnp.int32))
    return jnp.zeros((words, size), jnp.int32).at[row // 32, column].add(bit, mode="drop")
