"""Matrices to e4m3 as three products read them, each read once or twice and never copied to be transposed.

    both_ways     rows of x with a scale each, and the same values column by column
    slope_sizes   the largest |dy s_w| of every row and the largest |dy s_x| of every column
    slopes        dy s_w by rows, and dy s_x by columns as rows, each with its scales

The values of a row, and its scale, have the bits of `kernels/quantize`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from distilbeam.kernels.quantize.triton_kernels import quantized_tile, scale_of, size_of


@triton.jit
def both_ways(
    x, values, transposed, scale, M, K, row_stride, padded,
    BM: tl.constexpr, BK: tl.constexpr, LARGEST: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """Quantise rows of [M, K] to `values` [M, K] and `transposed` [K, padded], zero beyond M."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    row_in = (row < M)[:, None]
    largest = tl.zeros([BM], tl.float32)
    for start in range(0, K, BK):
        j = start + tl.arange(0, BK)[None, :]
        part = tl.load(x + row.to(tl.int64)[:, None] * row_stride + j, mask=row_in & (j < K), other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(size_of(part), axis=1))
    of_row = scale_of(largest, RECIPROCAL)
    tl.store(scale + row, of_row, mask=row < M)
    inverse = tl.div_rn(tl.full([BM], 1.0, tl.float32), of_row)[:, None]
    for start in range(0, K, BK):
        j = start + tl.arange(0, BK)[None, :]
        there = row_in & (j < K)
        part = tl.load(x + row.to(tl.int64)[:, None] * row_stride + j, mask=there, other=0.0).to(tl.float32)
        made = quantized_tile(part, inverse, LARGEST, False).to(values.dtype.element_ty)
        tl.store(values + row.to(tl.int64)[:, None] * K + j, made, mask=there)
        column = start + tl.arange(0, BK)[:, None]
        place = transposed + column.to(tl.int64) * padded + row[None, :]
        tl.store(place, tl.trans(made), mask=(column < K) & (row < padded)[None, :])


@triton.jit
def slope_sizes(dy, scale_w, scale_x, of_rows, of_columns, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Find the largest numbers of dy with its scales; `of_columns` starts at 0. A maximum has no order."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    row_in = (row < M)[:, None]
    by_row = tl.load(scale_x + row, mask=row < M, other=0.0)[:, None]
    largest = tl.zeros([BM], tl.float32)
    for start in range(0, N, BN):
        j = start + tl.arange(0, BN)
        place = dy + row.to(tl.int64)[:, None] * N + j[None, :]
        size = size_of(tl.load(place, mask=row_in & (j < N)[None, :], other=0.0).to(tl.float32))
        by_column = tl.load(scale_w + j, mask=j < N, other=0.0)[None, :]
        largest = tl.maximum(largest, tl.max(size * by_column, axis=1))
        tl.atomic_max(of_columns + j, tl.max(size * by_row, axis=0), mask=j < N, sem="relaxed")
    tl.store(of_rows + row, largest, mask=row < M)


@triton.jit
def slopes(
    dy, scale_w, scale_x, of_rows, of_columns, by_rows, by_columns, row_scale, column_scale, M, N, padded,
    BM: tl.constexpr, BN: tl.constexpr, LARGEST: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """Quantise dy s_w [M, N] by rows, and (dy s_x)^T [N, padded] by rows, zero beyond M."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    there = (row < M)[:, None] & (j < N)[None, :]
    given = tl.load(dy + row.to(tl.int64)[:, None] * N + j[None, :], mask=there, other=0.0).to(tl.float32)
    of_row = scale_of(tl.load(of_rows + row, mask=row < M, other=0.0), RECIPROCAL)
    of_column = scale_of(tl.load(of_columns + j, mask=j < N, other=0.0), RECIPROCAL)
    tl.store(row_scale + row, of_row, mask=(row < M) & (tl.program_id(1) == 0))
    tl.store(column_scale + j, of_column, mask=(j < N) & (tl.program_id(0) == 0))
    to_row = tl.div_rn(tl.full([BM], 1.0, tl.float32), of_row)[:, None]
    to_column = tl.div_rn(tl.full([BN], 1.0, tl.float32), of_column)[None, :]
    wide = given * tl.load(scale_w + j, mask=j < N, other=0.0)[None, :]
    made = quantized_tile(wide, to_row, LARGEST, False).to(by_rows.dtype.element_ty)
    tl.store(by_rows + row.to(tl.int64)[:, None] * N + j[None, :], made, mask=there)
    tall = given * tl.load(scale_x + row, mask=row < M, other=0.0)[:, None]
    made = quantized_tile(tall, to_column, LARGEST, False).to(by_columns.dtype.element_ty)
    place = by_columns + j.to(tl.int64)[:, None] * padded + row[None, :]
    tl.store(place, tl.trans(made), mask=(j < N)[:, None] & (row < padded)[None, :])
