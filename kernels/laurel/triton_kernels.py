"""The learned augmented residual as Triton kernels; the formulas are those of chunked.py.

    residual_rows   x', x A, and the norm of x' or its 8-bit values, some rows a program
    slope_rows      from the gradients above: those of f, x and the earlier residuals, g B^T, and the norm's mean
    column_sums     gradients of A, B, norm weight and coefficients, some columns of some rows a program

A program walks over its rows in tiles of [BM, BD], first for what a row needs in sum, then for what depends on it; the
second walk reads from the cache. Only the sums over rows need a third kernel, which reads x' gradient and x once more:
what the first two could leave behind for it would be larger. Sums over tiles are in float32 and in a fixed order.
AHEAD is how many tiles of a walk are read ahead of their use; None leaves it to the compiler, which does so where a tile is
multiplied alone. PRECISION is of the low-rank products: tf32, which holds bfloat16 and float16 exactly, or tf32x3 for float32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from distilbeam.kernels.quantize.triton_kernels import quantized_tile, scale_of, size_of

EPSILON = tl.constexpr(1e-6)


@triton.jit
def _map_tile(matrix, j, D, R, RANK: tl.constexpr):
    """Rows j of a [D, r] matrix as float32 [BD, RANK], zero where there is nothing."""
    rank = tl.arange(0, RANK)[None, :]
    return tl.load(matrix + j[:, None] * R + rank, mask=(j < D)[:, None] & (rank < R), other=0.0).to(tl.float32)


@triton.jit
def _up_tile(matrix, j, D, R, RANK: tl.constexpr):
    """Columns j of an [r, D] matrix as float32 [RANK, BD], zero where there is nothing."""
    rank = tl.arange(0, RANK)[:, None]
    return tl.load(matrix + rank * D + j[None, :], mask=(rank < R) & (j < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _low_tile(low, row, M, R, RANK: tl.constexpr):
    """Rows of an [M, r] matrix, zero where there is nothing."""
    rank = tl.arange(0, RANK)[None, :]
    return tl.load(low + row.to(tl.int64)[:, None] * R + rank, mask=(row < M)[:, None] & (rank < R), other=0.0)


@triton.jit
def _slope_tile(
    d_total, d_normed, total, norm_weight, inverse, mean, place, j, there, D, DIRECT: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """Gradient of a tile of x', float32, and the normalised x' there."""
    g = tl.zeros(place.shape, tl.float32)
    normal = g
    if DIRECT:
        g += tl.load(d_total + place, mask=there, other=0.0).to(tl.float32)
    if NORM:
        normal = tl.load(total + place, mask=there, other=0.0).to(tl.float32) * inverse[:, None]
        weight = tl.load(norm_weight + j, mask=j < D, other=0.0).to(tl.float32)[None, :]
        slope = tl.load(d_normed + place, mask=there, other=0.0).to(tl.float32) * weight
        g += (slope - normal * mean[:, None]) * inverse[:, None]
    return g, normal


@triton.jit
def residual_rows(
    f, x, coefficients, down, up, norm_weight, p0, p1, p2, p3, total, low, inverse, normed, scale, M, D, R,
    BM: tl.constexpr, BD: tl.constexpr, RANK: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr,
    NORM: tl.constexpr, QUANTIZE: tl.constexpr,
    LARGEST: tl.constexpr, RECIPROCAL: tl.constexpr, WHOLE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Make x' of some rows, and its norm; RANK 0: no maps; `normed` takes the 8-bit values where QUANTIZE."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    row_in = (row < M)[:, None]
    start_of = row.to(tl.int64)[:, None] * D
    alpha, beta = tl.load(coefficients), tl.load(coefficients + 1)
    if RANK > 0:
        u = tl.zeros([BM, RANK], tl.float32)
        for start in tl.range(0, D, BD, num_stages=AHEAD):
            j = start + tl.arange(0, BD)
            tile = tl.load(x + start_of + j[None, :], mask=row_in & (j < D)[None, :], other=0.0).to(tl.float32)
            u = tl.dot(tile, _map_tile(down, j, D, R, RANK), u, input_precision=PRECISION)
        rank = tl.arange(0, RANK)[None, :]
        tl.store(low + row.to(tl.int64)[:, None] * R + rank, u, mask=row_in & (rank < R))
    squares, largest = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for start in tl.range(0, D, BD, num_stages=AHEAD):
        j = start + tl.arange(0, BD)
        there, place = row_in & (j < D)[None, :], start_of + j[None, :]
        whole = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        if RANK > 0:
            whole = tl.dot(u, _up_tile(up, j, D, R, RANK), whole, input_precision=PRECISION)
        whole = whole * beta + alpha * tl.load(f + place, mask=there, other=0.0).to(tl.float32)
        if COUNT > 0:
            whole += tl.load(coefficients + 2) * tl.load(p0 + place, mask=there, other=0.0).to(tl.float32)
        if COUNT > 1:
            whole += tl.load(coefficients + 3) * tl.load(p1 + place, mask=there, other=0.0).to(tl.float32)
        if COUNT > 2:
            whole += tl.load(coefficients + 4) * tl.load(p2 + place, mask=there, other=0.0).to(tl.float32)
        if COUNT > 3:
            whole += tl.load(coefficients + 5) * tl.load(p3 + place, mask=there, other=0.0).to(tl.float32)
        stored = whole.to(total.dtype.element_ty)
        tl.store(total + place, stored, mask=there)
        if NORM:
            whole = stored.to(tl.float32)
            squares += tl.sum(whole * whole, axis=1)
            if QUANTIZE:
                weight = tl.load(norm_weight + j, mask=j < D, other=0.0).to(tl.float32)[None, :]
                largest = tl.maximum(largest, tl.max(size_of(whole * weight), axis=1))
    if NORM:
        by_root = tl.rsqrt(squares / D + EPSILON)
        tl.store(inverse + row, by_root, mask=row < M)
        of_row = scale_of(tl.where(by_root != by_root, 0.0, largest * by_root), RECIPROCAL)
        into = tl.div_rn(tl.full([BM], 1.0, tl.float32), of_row)
        nans = tl.zeros([BM], tl.int32)
        tl.debug_barrier()  # x' is read back by other threads than those that wrote it
        for start in tl.range(0, D, BD, num_stages=AHEAD):
            j = start + tl.arange(0, BD)
            there, place = row_in & (j < D)[None, :], start_of + j[None, :]
            weight = tl.load(norm_weight + j, mask=j < D, other=0.0).to(tl.float32)[None, :]
            tile = tl.load(total + place, mask=there, other=0.0).to(tl.float32) * by_root[:, None] * weight
            if QUANTIZE:
                nans = nans | tl.max((there & (tile != tile)).to(tl.int32), axis=1)
                tile = quantized_tile(tile, into[:, None], LARGEST, WHOLE)
            tl.store(normed + place, tile.to(normed.dtype.element_ty), mask=there)
        if QUANTIZE:
            if WHOLE:
                of_row = tl.where(nans > 0, float("nan"), of_row)
            tl.store(scale + row, of_row, mask=row < M)


@triton.jit
def slope_rows(
    d_total, d_normed, total, inverse, norm_weight, coefficients, down, up,
    d_update, d_residual, d0, d1, d2, d3, low, means, M, D, R,
    BM: tl.constexpr, BD: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    DIRECT: tl.constexpr, NORM: tl.constexpr, UPDATE: tl.constexpr, RESIDUAL: tl.constexpr, COUNT: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Make the gradients of f (UPDATE), x (RESIDUAL) and COUNT earlier residuals; `low` takes g B^T."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    row_in = (row < M)[:, None]
    start_of = row.to(tl.int64)[:, None] * D
    by_root, mean = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    if NORM:
        by_root = tl.load(inverse + row, mask=row < M, other=0.0)
        for start in tl.range(0, D, BD, num_stages=AHEAD):
            j = start + tl.arange(0, BD)
            there, place = row_in & (j < D)[None, :], start_of + j[None, :]
            normal = tl.load(total + place, mask=there, other=0.0).to(tl.float32) * by_root[:, None]
            weight = tl.load(norm_weight + j, mask=j < D, other=0.0).to(tl.float32)[None, :]
            mean += tl.sum(tl.load(d_normed + place, mask=there, other=0.0).to(tl.float32) * weight * normal, axis=1)
        mean = mean / D
        tl.store(means + row, mean, mask=row < M)
    if RANK > 0:
        v = tl.zeros([BM, RANK], tl.float32)
        for start in tl.range(0, D, BD, num_stages=AHEAD):
            j = start + tl.arange(0, BD)
            there, place = row_in & (j < D)[None, :], start_of + j[None, :]
            g, _ = _slope_tile(d_total, d_normed, total, norm_weight, by_root, mean, place, j, there, D, DIRECT, NORM)
            v = tl.dot(g, tl.trans(_up_tile(up, j, D, R, RANK)), v, input_precision=PRECISION)
        rank = tl.arange(0, RANK)[None, :]
        tl.store(low + row.to(tl.int64)[:, None] * R + rank, v, mask=row_in & (rank < R))
    for start in tl.range(0, D, BD, num_stages=AHEAD):
        j = start + tl.arange(0, BD)
        there, place = row_in & (j < D)[None, :], start_of + j[None, :]
        g, _ = _slope_tile(d_total, d_normed, total, norm_weight, by_root, mean, place, j, there, D, DIRECT, NORM)
        if UPDATE:
            tl.store(d_update + place, (tl.load(coefficients) * g).to(d_update.dtype.element_ty), mask=there)
        if COUNT > 0:
            tl.store(d0 + place, (tl.load(coefficients + 2) * g).to(d0.dtype.element_ty), mask=there)
        if COUNT > 1:
            tl.store(d1 + place, (tl.load(coefficients + 3) * g).to(d1.dtype.element_ty), mask=there)
        if COUNT > 2:
            tl.store(d2 + place, (tl.load(coefficients + 4) * g).to(d2.dtype.element_ty), mask=there)
        if COUNT > 3:
            tl.store(d3 + place, (tl.load(coefficients + 5) * g).to(d3.dtype.element_ty), mask=there)
        if RESIDUAL:
            if RANK > 0:
                g = tl.dot(v, tl.trans(_map_tile(down, j, D, R, RANK)), g, input_precision=PRECISION)
            tl.store(d_residual + place, (tl.load(coefficients + 1) * g).to(d_residual.dtype.element_ty), mask=there)


@triton.jit
def column_sums(
    d_total, d_normed, total, inverse, means, norm_weight, f, x, p0, p1, p2, p3, low, slope_low,
    d_down, d_up, d_weight, d_coefficients, M, D, R, stride,
    SPLIT: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    DIRECT: tl.constexpr, NORM: tl.constexpr, MAPS: tl.constexpr, WEIGHT: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, INNER: tl.constexpr, COUNT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Sum up BD columns over SPLIT blocks of BM rows; the results of all parts, `stride` apart, are added up afterwards.

    INNER: the gradient of beta has the product of `low` and `slope_low`, which the first columns' programs add to theirs.
    """
    j = tl.program_id(0) * BD + tl.arange(0, BD)
    part = tl.program_id(1)
    from_part = part.to(tl.int64) * stride
    inner = tl.zeros([BM], tl.float32)
    sum_down, sum_up = tl.zeros([BD, RANK], tl.float32), tl.zeros([RANK, BD], tl.float32)
    # sums of single numbers stay spread over the tile: one reduction at the end
    of_weight, of_alpha, of_beta = (
        tl.zeros([BM, BD], tl.float32),
        tl.zeros([BM, BD], tl.float32),
        tl.zeros([BM, BD], tl.float32),
    )
    of_0, of_1 = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
    of_2, of_3 = tl.zeros([BM, BD], tl.float32), tl.zeros([BM, BD], tl.float32)
    for number in tl.range(SPLIT, num_stages=AHEAD):
        row = (part * SPLIT + number) * BM + tl.arange(0, BM)
        there = (row < M)[:, None] & (j < D)[None, :]
        place = row.to(tl.int64)[:, None] * D + j[None, :]
        by_root, mean = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        if NORM:
            by_root = tl.load(inverse + row, mask=row < M, other=0.0)
            mean = tl.load(means + row, mask=row < M, other=0.0)
        g, normal = _slope_tile(d_total, d_normed, total, norm_weight, by_root, mean, place, j, there, D, DIRECT, NORM)
        if WEIGHT:
            of_weight += tl.load(d_normed + place, mask=there, other=0.0).to(tl.float32) * normal
        if ALPHA:
            of_alpha += g * tl.load(f + place, mask=there, other=0.0).to(tl.float32)
        if MAPS or BETA:
            tile = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
            if BETA:
                of_beta += g * tile
            if MAPS or INNER:
                v, u = _low_tile(slope_low, row, M, R, RANK), _low_tile(low, row, M, R, RANK)
            if MAPS:
                sum_down = tl.dot(tl.trans(tile), v, sum_down, input_precision=PRECISION)
                sum_up = tl.dot(tl.trans(u), g, sum_up, input_precision=PRECISION)
            if INNER:
                inner += tl.sum(u * v, axis=1)
        if COUNT > 0:
            of_0 += g * tl.load(p0 + place, mask=there, other=0.0).to(tl.float32)
        if COUNT > 1:
            of_1 += g * tl.load(p1 + place, mask=there, other=0.0).to(tl.float32)
        if COUNT > 2:
            of_2 += g * tl.load(p2 + place, mask=there, other=0.0).to(tl.float32)
        if COUNT > 3:
            of_3 += g * tl.load(p3 + place, mask=there, other=0.0).to(tl.float32)
    if MAPS:
        column, rank = j[:, None], tl.arange(0, RANK)[None, :]
        tl.store(d_down + from_part + column * R + rank, sum_down, mask=(column < D) & (rank < R))
        column, rank = j[None, :], tl.arange(0, RANK)[:, None]
        tl.store(d_up + from_part + rank * D + column, sum_up, mask=(column < D) & (rank < R))
    if WEIGHT:
        tl.store(d_weight + from_part + j, tl.sum(of_weight, axis=0), mask=j < D)
    sums = d_coefficients + from_part + tl.program_id(0) * (2 + COUNT)
    tl.store(sums, tl.sum(of_alpha))
    tl.store(sums + 1, tl.sum(of_beta) + tl.where(tl.program_id(0) == 0, tl.sum(inner), 0.0))
    if COUNT > 0:
        tl.store(sums + 2, tl.sum(of_0))
    if COUNT > 1:
        tl.store(sums + 3, tl.sum(of_1))
    if COUNT > 2:
        tl.store(sums + 4, tl.sum(of_2))
    if COUNT > 3:
        tl.store(sums + 5, tl.sum(of_3))
