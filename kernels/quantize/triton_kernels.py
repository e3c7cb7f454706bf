"""Rowwise quantisation as a Triton kernel; `quantized_tile` is also the end of the kernels that quantise what they make.

The bits are those of reference.py: the one division of a row is made by IEEE's rules, and between a product and the sum
that rounds to whole numbers stands a clamp, so that the two cannot be contracted into one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

LARGEST_FLOAT32 = tl.constexpr(3.4028234663852886e38)
SCALE_FLOOR = tl.constexpr(2.0**-100)
TO_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves no bit behind the point


@triton.jit
def scale_of(largest, RECIPROCAL: tl.constexpr):
    """Scale of rows from their largest absolute values; NaN must be left out before."""
    return tl.maximum(tl.minimum(largest, LARGEST_FLOAT32) * RECIPROCAL, SCALE_FLOOR)


@triton.jit
def quantized_tile(x, inverse, LARGEST: tl.constexpr, WHOLE: tl.constexpr):
    """Values x * inverse, clamped, in float32: whole numbers for int8, zero where x is NaN; else NaN there."""
    absent = x != x
    scaled = tl.maximum(tl.minimum(x * inverse, LARGEST), -LARGEST)
    return tl.where(absent, 0.0, scaled + TO_WHOLE - TO_WHOLE) if WHOLE else tl.where(absent, float("nan"), scaled)


@triton.jit
def size_of(x):
    """Absolute values, zero where x is NaN."""
    return tl.where(x != x, 0.0, tl.abs(x))


@triton.jit
def quantize_rows(
    x, values, scale, M, D, row_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr,
    LARGEST: tl.constexpr, RECIPROCAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Quantise ROWS rows of [M, D], whose last dimension is dense; ONCE: a row fits BLOCK and is read once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_in = (row < M)[:, None]
    start_of = row.to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    largest, nans = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.int32)
    if ONCE:
        tile = tl.load(x + start_of * row_stride + column, mask=row_in & (column < D), other=0.0).to(tl.float32)
        largest, nans = size_of(tile), (tile != tile).to(tl.int32)
    else:
        for start in range(0, D, BLOCK):
            j = start + column
            part = tl.load(x + start_of * row_stride + j, mask=row_in & (j < D), other=0.0).to(tl.float32)
            largest = tl.maximum(largest, size_of(part))
            nans = nans | (part != part).to(tl.int32)
    of_row = scale_of(tl.max(largest, axis=1), RECIPROCAL)
    inverse = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), of_row)[:, None]
    stored = tl.where(tl.max(nans, axis=1) > 0, float("nan"), of_row) if WHOLE else of_row
    tl.store(scale + row, stored, mask=row < M)
    if ONCE:
        there = row_in & (column < D)
        done = quantized_tile(tile, inverse, LARGEST, WHOLE)
        tl.store(values + start_of * D + column, done.to(values.dtype.element_ty), mask=there)
    else:
        for start in range(0, D, BLOCK):
            j = start + column
            there = row_in & (j < D)
            part = tl.load(x + start_of * row_stride + j, mask=there, other=0.0).to(tl.float32)
            done = quantized_tile(part, inverse, LARGEST, WHOLE)
            tl.store(values + start_of * D + j, done.to(values.dtype.element_ty), mask=there)
