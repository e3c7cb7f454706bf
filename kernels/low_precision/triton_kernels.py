"""The product of two int8 matrices on the tensor cores, scaled by rows as it is stored."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled_product(
    a, b, scale_a, scale_b, bias, out, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """out = (a scale_a) (b scale_b)^T + bias of int8 a [M, K] and b [N, K], with int32 sums."""
    # GROUP blocks of rows go down a column of blocks together, so that their operands meet in the cache
    blocks_m, blocks_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    in_group = GROUP * blocks_n
    first = tl.program_id(0) // in_group * GROUP
    size = tl.minimum(blocks_m - first, GROUP)
    m = (first + tl.program_id(0) % in_group % size) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % in_group // size) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.int32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.load(
            a + m[:, None].to(tl.int64) * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0
        )
        right = tl.load(
            b + n[None, :].to(tl.int64) * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0
        )
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    result = total.to(tl.float32) * tl.load(scale_a + m, mask=m < M, other=0.0)[:, None]
    result *= tl.load(scale_b + n, mask=n < N, other=0.0)[None, :]
    if BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    place = out + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
