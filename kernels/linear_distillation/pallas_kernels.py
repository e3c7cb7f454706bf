"""The fused last layer and loss as Pallas kernels for TPUs, as plain JAX functions.

    first_pass   logits of the kept classes, and the rest's logit: tau * logsumexp(z / tau) over the classes not kept
    gradients    of hidden, weight and bias, from the gradients of the buckets

A program holds BLOCK_ROWS rows and some classes with all their features; the logits of a block are made on the matrix
unit in float32, used, and forgotten. Which classes a row keeps is a bit in a word of 32 rows, so that a word spreads
over sublanes; the few products with kept classes are left to XLA. Classes are visited in parts of PART_CLASSES, whose
bits exist one part at a time. Operands may be float32, bfloat16, or int8 with a scale per row, whose logits are sums of
int32 and whose gradients are multiplied in bfloat16.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from distilbeam.kernels.distillation.pallas_kernels import (
    BLOCK_ROWS,
    NOTHING,
    bits_of,
    first_of_its_kind,
    padded_rows,
    without_kept,
)

PART_CLASSES = 32_768


def block_classes(features: int) -> int:
    """Choose how many classes a block has: as many as keep its weights and their gradient within 4 MiB."""
    return next((size for size in (512, 256) if size * features <= 1 << 19), 128)


def first_pass(
    hidden: Any,
    weight: Any,
    row_scale: Any,
    class_scale: Any,
    bias: Any,
    classes: Any,
    tau: float,
    *,
    interpret: bool = False,
) -> tuple[Any, Any]:
    """Compute the logits of the buckets.

    Args:
      hidden: [B, H].
      weight: [C, H], of the same dtype.
      row_scale: factor of each row of int8 inputs, float32 [B, 1]; not looked at for others.
      class_scale: factor of each row of an int8 weight, float32 [C], likewise.
      bias: float32 [C].
      classes: int32 [B, K], distinct but for padding, which repeats a row's first.
      tau: temperature of the rest bucket.
      interpret: run the kernels in Pallas' interpreter, on any device.

    Returns:
      float32 [B, K] and [B, 1]; the rest is -inf where a row keeps every class.
    """
    rows = hidden.shape[0]
    padded, padded_scale = padded_rows(hidden, 0), padded_rows(row_scale, 0)
    levels = []
    for first, part, part_scale, part_bias in _parts(weight, class_scale, bias):
        bits = bits_of(classes, first, part.shape[0])
        top, total = _rest_of_part(padded, part, padded_scale, part_scale, part_bias, bits, tau, interpret)
        levels.append(jnp.where(total > 0, top + tau * jnp.log(total), NOTHING)[:rows])
    rest = tau * jax.scipy.special.logsumexp(jnp.concatenate(levels, axis=1) / tau, axis=1, keepdims=True)
    return _kept_logits(hidden, weight, row_scale, class_scale, bias, classes), rest


def gradients(
    hidden: Any,
    weight: Any,
    row_scale: Any,
    class_scale: Any,
    bias: Any,
    classes: Any,
    kept: Any,
    slope: Any,
    rest: Any,
    tau: float,
    *,
    interpret: bool = False,
) -> tuple[Any, Any, Any]:
    """Compute the gradients of the layer.

    Args:
      hidden: [B, H].
      weight: [C, H].
      row_scale: as for `first_pass`.
      class_scale: as for `first_pass`.
      bias: float32 [C].
      classes: int32 [B, K], as for `first_pass`.
      kept: gradient of the kept classes' logits, float32 [B, K].
      slope: gradient of the rest's logit, float32 [B, 1].
      rest: its logit, float32 [B, 1], +inf where it is empty.
      tau: temperature of the rest bucket.
      interpret: run the kernels in Pallas' interpreter, on any device.

    Returns:
      Gradients of hidden, weight and bias, float32.
    """
    rows = hidden.shape[0]
    padded, padded_scale = padded_rows(hidden, 0), padded_rows(row_scale, 0)
    padded_slope, padded_rest = padded_rows(slope, 0), padded_rows(rest, jnp.inf)
    d_hidden, d_weight, d_bias = jnp.zeros(padded.shape, jnp.float32), [], []
    for first, part, part_scale, part_bias in _parts(weight, class_scale, bias):
        bits = bits_of(classes, first, part.shape[0])
        operands = (padded, part, padded_scale, part_scale, part_bias, bits, padded_slope, padded_rest)
        d_hidden += _hidden_gradient(*operands, tau, interpret)
        part_weight, part_bias_gradient = _weight_gradient(*operands, tau, interpret)
        d_weight.append(part_weight)
        d_bias.append(part_bias_gradient[0])
    once = first_of_its_kind(classes) * kept
    wide_hidden = _wide(hidden, row_scale)

    def add_kept(k, sums):
        d_hidden, d_weight, d_bias = sums
        ids, g = classes[:, k], once[:, k]
        d_hidden += g[:, None] * _wide(weight[ids], class_scale[ids, None])
        return d_hidden, d_weight.at[ids].add(g[:, None] * wide_hidden), d_bias.at[ids].add(g)

    sums = d_hidden[:rows], jnp.concatenate(d_weight), jnp.concatenate(d_bias)
    # one kept class of all rows at a time: [B, H]
    d_hidden, d_weight_C, d_bias_C = jax.lax.fori_loop(0, classes.shape[1], add_kept, sums)
    return d_hidden, d_weight_C, d_bias_C


def _wide(values, scale):
    """Rows in float32."""
    return values.astype(jnp.float32) * scale if values.dtype == jnp.int8 else values.astype(jnp.float32)


def _block_logits(block: Any, classes: int, hidden, weight, row_scale, class_scale, bias, bits):
    """Logits of a block, -inf where a class is kept or does not exist."""
    contraction = (((1,), (1,)), ((), ()))
    if hidden.dtype == jnp.int8:
        total = jax.lax.dot_general(hidden, weight, contraction, preferred_element_type=jnp.int32)
        z = total.astype(jnp.float32) * row_scale * class_scale + bias
    else:
        exact = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
        z = jax.lax.dot_general(hidden, weight, contraction, precision=exact, preferred_element_type=jnp.float32) + bias
    return without_kept(z, bits, block, classes)


def _block_gradient(
    block: Any, classes: int, tau: float, hidden, weight, row_scale, class_scale, bias, bits, slope, rest
):
    z = _block_logits(block, classes, hidden, weight, row_scale, class_scale, bias, bits)
    return jnp.where(z == NOTHING, 0.0, slope * jnp.exp((z - rest) / tau))


def _existing(weight, block: Any, classes: int):
    """Zero the weights past the last class: what lies there may be NaN, and 0 * NaN is no 0."""
    number = block * weight.shape[0] + jax.lax.broadcasted_iota(jnp.int32, weight.shape, 0)
    return jnp.where(number < classes, weight, jnp.zeros_like(weight))


def _read(*blocks) -> Any:
    return tuple(block[...] for block in blocks)


def _rest_kernel(hidden, weight, row_scale, class_scale, bias, bits, top, total, *, classes: int, tau: float):
    @pl.when(pl.program_id(1) == 0)
    def _():
        top[...] = jnp.full(top.shape, NOTHING, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)

    parts = _read(hidden, weight, row_scale, class_scale, bias, bits)
    z = _block_logits(pl.program_id(1), classes, *parts)
    before = top[...]
    higher = jnp.maximum(before, z.max(axis=1, keepdims=True))
    safe = jnp.where(higher == NOTHING, 0.0, higher)
    total[...] = total[...] * jnp.exp((before - safe) / tau) + jnp.exp((z - safe) / tau).sum(axis=1, keepdims=True)
    top[...] = higher


def _hidden_kernel(hidden, weight, row_scale, class_scale, bias, bits, slope, rest, out, *, classes: int, tau: float):
    @pl.when(pl.program_id(1) == 0)
    def _():
        out[...] = jnp.zeros(out.shape, jnp.float32)

    block = pl.program_id(1)
    parts = _read(hidden, weight, row_scale, class_scale, bias, bits, slope, rest)
    g = _block_gradient(block, classes, tau, *parts)
    values = _existing(weight[...], block, classes)
    if values.dtype == jnp.int8:  # bfloat16 holds whole numbers of 8 bits: the scale goes to the gradient
        g = jnp.where(g == 0.0, 0.0, g * class_scale[...])  # past the last class the scale may be NaN
        values = values.astype(jnp.bfloat16)
    out[...] += _product(g.astype(values.dtype), values, 1, 0)


def _weight_kernel(
    hidden, weight, row_scale, class_scale, bias, bits, slope, rest, out, bias_out, *, classes: int, tau: float
):
    @pl.when(pl.program_id(1) == 0)
    def _():
        out[...] = jnp.zeros(out.shape, jnp.float32)
        bias_out[...] = jnp.zeros(bias_out.shape, jnp.float32)

    parts = _read(hidden, weight, row_scale, class_scale, bias, bits, slope, rest)
    g = _block_gradient(pl.program_id(0), classes, tau, *parts)
    bias_out[...] += g.sum(axis=0, keepdims=True)
    values = hidden[...]
    if values.dtype == jnp.int8:
        g, values = g * row_scale[...], values.astype(jnp.bfloat16)
    out[...] += _product(g.astype(values.dtype), values, 0, 0)


def _product(a, b, axis_a: int, axis_b: int):
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    contraction = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, contraction, precision=exact, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames=("tau", "interpret"))
def _rest_of_part(hidden, weight, row_scale, class_scale, bias, bits, tau: float, interpret: bool):
    grid, specs = _layout(hidden, weight, rows_first=True)
    column = pl.BlockSpec((BLOCK_ROWS, 1), lambda row, _: (row, 0))
    shape = jax.ShapeDtypeStruct((hidden.shape[0], 1), jnp.float32)
    kernel = functools.partial(_rest_kernel, classes=weight.shape[0], tau=tau)
    call = pl.pallas_call(
        kernel, grid=grid, in_specs=specs[:6], out_specs=[column, column], out_shape=[shape, shape], interpret=interpret
    )
    return call(hidden, weight, row_scale, class_scale, bias, bits)


@functools.partial(jax.jit, static_argnames=("tau", "interpret"))
def _hidden_gradient(hidden, weight, row_scale, class_scale, bias, bits, slope, rest, tau: float, interpret: bool):
    grid, specs = _layout(hidden, weight, rows_first=True)
    kernel = functools.partial(_hidden_kernel, classes=weight.shape[0], tau=tau)
    shape = jax.ShapeDtypeStruct(hidden.shape, jnp.float32)
    call = pl.pallas_call(kernel, grid=grid, in_specs=specs, out_specs=specs[0], out_shape=shape, interpret=interpret)
    return call(hidden, weight, row_scale, class_scale, bias, bits, slope, rest)


@functools.partial(jax.jit, static_argnames=("tau", "interpret"))
def _weight_gradient(hidden, weight, row_scale, class_scale, bias, bits, slope, rest, tau: float, interpret: bool):
    grid, specs = _layout(hidden, weight, rows_first=False)
    kernel = functools.partial(_weight_kernel, classes=weight.shape[0], tau=tau)
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (weight, bias)]
    call = pl.pallas_call(
        kernel, grid=grid, in_specs=specs, out_specs=[specs[1], specs[4]], out_shape=shapes, interpret=interpret
    )
    return call(hidden, weight, row_scale, class_scale, bias, bits, slope, rest)


def _layout(hidden, weight, *, rows_first: bool):
    """Grid and blocks of hidden, weight, their scales, bias, bits, slope and rest; the second grid axis is the one summed over."""
    (rows, features), classes = hidden.shape, weight.shape[0]
    size = min(block_classes(features), classes)

    def at(*axes):
        def index(first, second):
            row, block = (first, second) if rows_first else (second, first)
            return tuple({"row": row, "class": block, None: 0}[axis] for axis in axes)

        return index

    specs = [
        pl.BlockSpec((BLOCK_ROWS, features), at("row", None)),
        pl.BlockSpec((size, features), at("class", None)),
        pl.BlockSpec((BLOCK_ROWS, 1), at("row", None)),
        pl.BlockSpec((1, size), at(None, "class")),
        pl.BlockSpec((1, size), at(None, "class")),
        pl.BlockSpec((BLOCK_ROWS // 32, size), at("row", "class")),
        pl.BlockSpec((BLOCK_ROWS, 1), at("row", None)),
        pl.BlockSpec((BLOCK_ROWS, 1), at("row", None)),
    ]
    grid = (rows // BLOCK_ROWS, pl.cdiv(classes, size))
    return (grid if rows_first else grid[::-1]), specs


def _parts(weight, class_scale, bias):
    for first in range(0, weight.shape[0], PART_CLASSES):
        part = slice(first, first + PART_CLASSES)
        yield first, weight[part], class_scale[None, part], bias[None, part]


def _kept_logits(hidden, weight, row_scale, class_scale, bias, classes):
    wide = _wide(hidden, row_scale)

    def one(ids):
        return (wide * _wide(weight[ids], class_scale[ids, None])).sum(axis=1) + bias[ids]

    return jax.lax.map(one, classes.T).T
