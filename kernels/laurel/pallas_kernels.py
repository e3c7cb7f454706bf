"""The learned augmented residual as Pallas kernels for TPUs, as plain JAX functions; formulas as in chunked.py.

A program holds some rows of everything whole, so that each tensor is read once and written once, in the forward and in
the backward pass; the gradients of A, B, norm weight and coefficients stay in one block of memory while the programs,
which run one after the other, add to it. The low-rank products are in the precision of the rows with float32 sums.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distilbeam.kernels.quantize.formats import Format
from distilbeam.kernels.quantize.pallas_kernels import JAX_DTYPES, quantized, scale_of

EPSILON = 1e-6
BLOCK_ELEMENTS = 1 << 18  # of one tensor in a program, of which a program holds up to a dozen
LANES = 128  # the coefficients' gradients lie along one row of lanes


def block_rows(dim: int) -> int:
    """Choose how many rows a block has: a multiple of the 32 that 8-bit tiles have."""
    return max(32, min(512, BLOCK_ELEMENTS // dim // 32 * 32))


@functools.partial(jax.jit, static_argnames=("target", "stream", "interpret"))
def forward(
    update: Any,
    residual: Any,
    coefficients: Any,
    down: Any,
    up: Any,
    norm_weight: Any,
    previous: Sequence[Any],
    target: Format | None = None,
    stream: str | None = None,
    *,
    interpret: bool = False,
) -> dict[str, Any]:
    """Compute x' and what was asked for besides.

    Args:
      update: f, float32 or bfloat16 [M, D].
      residual: x, [M, D].
      coefficients: float32 [2 + k].
      down: A [D, r], or None.
      up: B [r, D], or None.
      norm_weight: [D], or None.
      previous: k earlier residuals, [M, D].
      target: format to quantise the normalised form to, or None.
      stream: dtype of x'; None for the update's.
      interpret: run the kernel in Pallas' interpreter, on any device.

    Returns:
      `total`; with maps `low`; with a norm `inverse` and `normed`, or `values` and `scale`.
    """
    rows, dim = update.shape
    given = {"f": update, "x": residual, **_numbered("p", previous), **_maps(down, up, norm_weight)}
    results = {"total": (dim, jnp.dtype(stream or update.dtype))}
    if down is not None:
        results["low"] = (down.shape[1], jnp.float32)
    if norm_weight is not None:
        results["inverse"] = (1, jnp.float32)
        if target is None:
            results["normed"] = (dim, update.dtype)
        else:
            results |= {"values": (dim, JAX_DTYPES[str(target.dtype)]), "scale": (1, jnp.float32)}
    kernel = functools.partial(_forward_kernel, count=len(previous), target=target)
    return _call(kernel, coefficients, given, results, {}, rows, dim, interpret)


@functools.partial(jax.jit, static_argnames=("wanted", "dtypes", "interpret"))
def backward(
    kept: Mapping[str, Any],
    coefficients: Any,
    slopes: Mapping[str, Any],
    wanted: Any,
    dtypes: tuple[str, ...] | None = None,
    *,
    interpret: bool = False,
) -> dict[str, Any]:
    """Compute the gradients that are wanted.

    Args:
      kept: `f`, `x`, `p0`, ... where their coefficients are learned, `down`, `up`, `weight`, `total`, `low`, `inverse`.
      coefficients: float32 [2 + k].
      slopes: gradients from above: `d_total`, `d_normed`, or both, [M, D].
      wanted: which gradients, an `operands.Wanted`.
      dtypes: of the gradients of f, x, p0, ...; None for that of the slopes.
      interpret: run the kernel in Pallas' interpreter, on any device.

    Returns:
      `d_f`, `d_x`, `d_p0`, ..., and float32 `d_down`, `d_up`, `d_weight` [1, D], `d_coefficients` [1, 128].
    """
    slope = next(iter(slopes.values()))
    rows, dim = slope.shape
    count = coefficients.shape[0] - 2
    results = {"d_f": wanted.update, "d_x": wanted.residual}
    results |= {f"d_p{j}": wanted.previous for j in range(count)}
    kinds = dtypes or (slope.dtype,) * len(results)
    pairs = zip(results.items(), kinds, strict=True)
    results = {name: (dim, jnp.dtype(kind)) for (name, asked), kind in pairs if asked}
    sums = {"d_coefficients": (1, LANES)} if wanted.alpha or wanted.beta or wanted.gamma else {}
    if wanted.maps and "down" in kept:
        sums |= {"d_down": kept["down"].shape, "d_up": kept["up"].shape}
    if wanted.norm_weight and "d_normed" in slopes:
        sums["d_weight"] = (1, dim)
    kernel = functools.partial(_backward_kernel, wanted=wanted, count=count)
    return _call(kernel, coefficients, {**kept, **slopes}, results, sums, rows, dim, interpret)


def _forward_kernel(refs: dict[str, Any], *, count: int, target: Format | None):
    alpha, beta = refs["coefficients"][0], refs["coefficients"][1]
    whole = refs["x"][...].astype(jnp.float32)
    if "down" in refs:
        low = _dot(refs["x"][...], refs["down"][...], refs["total"].dtype)
        refs["low"][...] = low
        whole += _dot(low, refs["up"][...], refs["total"].dtype)
    whole = beta * whole + alpha * refs["f"][...].astype(jnp.float32)
    for j in range(count):
        whole += refs["coefficients"][2 + j] * refs[f"p{j}"][...].astype(jnp.float32)
    stored = whole.astype(refs["total"].dtype)
    refs["total"][...] = stored
    if "weight" not in refs:
        return
    whole = stored.astype(jnp.float32)
    inverse = jax.lax.rsqrt((whole * whole).mean(axis=1, keepdims=True) + EPSILON)
    refs["inverse"][...] = inverse
    normed = whole * inverse * refs["weight"][...].astype(jnp.float32)
    if target is None:
        refs["normed"][...] = normed.astype(refs["normed"].dtype)
    else:
        refs["values"][...], refs["scale"][...] = quantized(normed, scale_of(normed, target), target)


def _backward_kernel(refs: dict[str, Any], *, wanted: Any, count: int):
    @pl.when(pl.program_id(0) == 0)
    def _():
        for name in ("d_down", "d_up", "d_weight", "d_coefficients"):
            if name in refs:
                refs[name][...] = jnp.zeros(refs[name].shape, jnp.float32)

    alpha, beta = refs["coefficients"][0], refs["coefficients"][1]
    g = _slope(refs)
    if "d_f" in refs:
        refs["d_f"][...] = (alpha * g).astype(refs["d_f"].dtype)
    for j in range(count):
        if f"d_p{j}" in refs:
            refs[f"d_p{j}"][...] = (refs["coefficients"][2 + j] * g).astype(refs[f"d_p{j}"].dtype)
    d_x, d_beta = g, 0.0
    if "down" in refs:
        kind = refs["d_total" if "d_total" in refs else "d_normed"].dtype
        v = _dot(g, refs["up"][...], kind, 1, 1)
        d_x = g + _dot(v, refs["down"][...], kind, 1, 1)
        if "d_down" in refs:
            refs["d_down"][...] += beta * _dot(refs["x"][...], v, kind, 0, 0)
            refs["d_up"][...] += beta * _dot(refs["low"][...], g, kind, 0, 0)
        if wanted.beta:
            d_beta = (refs["low"][...] * v).sum()
    if "d_x" in refs:
        refs["d_x"][...] = (beta * d_x).astype(refs["d_x"].dtype)
    if "d_coefficients" in refs:
        learned = [(0, "f", wanted.alpha), (1, "x", wanted.beta)]
        learned += [(2 + j, f"p{j}", wanted.gamma) for j in range(count)]
        lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        for place, name, asked in learned:
            if asked:
                total = (g * refs[name][...].astype(jnp.float32)).sum() + (d_beta if place == 1 else 0.0)
                refs["d_coefficients"][...] += jnp.where(lane == place, total, 0.0)


def _slope(refs: dict[str, Any]):
    """Gradient of x', float32; adds to the gradient of the norm's weight."""
    g = refs["d_total"][...].astype(jnp.float32) if "d_total" in refs else 0.0
    if "d_normed" not in refs:
        return g
    inverse, d_normed = refs["inverse"][...], refs["d_normed"][...].astype(jnp.float32)
    normal = refs["total"][...].astype(jnp.float32) * inverse
    if "d_weight" in refs:
        refs["d_weight"][...] += (d_normed * normal).sum(axis=0, keepdims=True)
    slope = d_normed * refs["weight"][...].astype(jnp.float32)
    return g + (slope - normal * (slope * normal).mean(axis=1, keepdims=True)) * inverse


def _dot(a, b, kind: Any, axis_a: int = 1, axis_b: int = 0):
    """Multiply with float32 sums, exactly for float32 rows, else in bfloat16."""
    exact = kind == jnp.float32
    narrow = jnp.float32 if exact else jnp.bfloat16
    return jax.lax.dot_general(
        a.astype(narrow),
        b.astype(narrow),
        (((axis_a,), (axis_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _call(
    kernel: Any,
    coefficients: Any,
    given: Mapping[str, Any],
    results: Mapping[str, tuple[int, Any]],
    sums: Mapping[str, tuple[int, ...]],
    rows: int,
    dim: int,
    interpret: bool,
) -> dict[str, Any]:
    """Run a kernel over blocks of rows; what is small or summed up is one block for all programs."""
    size = block_rows(dim)
    padding = -rows % size
    small = {"down", "up", "weight"}
    arrays = {
        name: x if name in small else jnp.pad(x, ((0, padding), (0, 0))) for name, x in given.items() if x is not None
    }

    def block(name: str, shape: tuple[int, ...]):
        if name in small or name in sums:
            return pl.BlockSpec(shape, lambda _: (0,) * len(shape))
        return pl.BlockSpec((size, shape[1]), lambda i: (i, 0))

    shapes = {name: jax.ShapeDtypeStruct((rows + padding, wide), kind) for name, (wide, kind) in results.items()}
    shapes |= {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sums.items()}
    names = ["coefficients", *arrays, *shapes]
    call = pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True))),
        grid=((rows + padding) // size,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *(block(name, x.shape) for name, x in arrays.items())],
        out_specs=[block(name, x.shape) for name, x in shapes.items()],
        out_shape=list(shapes.values()),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
    )
    made = dict(zip(shapes, call(coefficients, *arrays.values()), strict=True))
    return {name: x if name in sums else x[:rows] for name, x in made.items()}


def _numbered(prefix: str, arrays: Sequence[Any]) -> dict[str, Any]:
    return {f"{prefix}{j}": x for j, x in enumerate(arrays)}


def _maps(down: Any, up: Any, norm_weight: Any) -> dict[str, Any]:
    return {"down": down, "up": up, "weight": None if norm_weight is None else norm_weight[None, :]}
