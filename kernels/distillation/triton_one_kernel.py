"""Value and gradient of sparse labels in one kernel, which keeps part of the row in registers and finds the rest in the L2.

A program sums its row up from the end to the beginning, holds the first HELD blocks of it as the 16-bit numbers that they
are, and writes the gradient from these and from what the cache still has: one reading and one writing of memory where the
multiprocessors' rows fit the cache together. An octet of classes that holds a kept one is left out of the sweep, which then
needs no test for every class, and is summed up by itself afterwards. Whatever the factor from above is, `rescale` looks at
it on the device. Not measured on a GPU yet.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from distilbeam.kernels.distillation.triton_kernels import LOG2_E, OCTET, bucket_problem, mark_row, together


@triton.jit
def _dirty(words_row, first, C, TAIL: tl.constexpr):
    """Whether an octet has a kept class."""
    word = tl.load(words_row + first // 32, mask=first < C, other=0) if TAIL else tl.load(words_row + first // 32)
    byte = ((word >> (first % 32)) & 255) + tl.zeros([1, OCTET], tl.int32)
    return tl.max(byte, axis=1) != 0


@triton.jit
def _sum_up(z, dirty, top, total, by_tau):
    """Take a block of octets into the maximum and the sum of exponentials of every place."""
    NOTHING = -float("inf")
    higher = tl.maximum(top, tl.where(dirty, NOTHING, tl.max(z, axis=1)))
    safe = (
        tl.where(higher == NOTHING, 0.0, higher) * by_tau
    )  # 16-bit logits have no digits that a shared offset could take
    part = tl.sum(tl.exp2(z * by_tau - safe[:, None]), axis=1)
    total = total * tl.exp2(top * by_tau - safe) + tl.where(dirty, 0.0, part)
    return higher, total


@triton.jit
def _again(z, nought):
    """The same numbers, of which the compiler does not know it, so that it keeps 16 bits of each and not 32."""
    return (z.to(tl.int16, bitcast=True) ^ nought.to(tl.int16)).to(z.dtype, bitcast=True)


@triton.jit
def _slope(z, g_rest, shift, by_tau, dtype: tl.constexpr):
    """Gradient of a block of the rest; 0 where the rest has none, whatever the logits are."""
    return tl.where(g_rest == 0.0, 0.0, g_rest * tl.exp2(z.to(tl.float32) * by_tau - shift)).to(dtype)


@triton.jit
def value_and_gradient(
    logits, bits, classes, padding, logy, logy_rest, scale, valid, losses, gradient, zero,
    C, row_stride, gradient_stride, words, T, tau,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
    PADDED: tl.constexpr, MASKED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """One row of [B, C] 16-bit logits with a rest bucket; HELD * BLOCK is at most C; the gradient may take their place."""
    NOTHING = -float("inf")
    kind = gradient.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    z_row, words_row, g_row = logits + row * row_stride, bits + row * words, gradient + row * gradient_stride
    counts = row >= 0
    if MASKED:
        counts = tl.load(valid + row) != 0
    k = tl.arange(0, KP)
    here = k < K
    ids = tl.load(classes + row * K + k, mask=here, other=0)
    there = here
    if PADDED:
        there = there & (tl.load(padding + row * K + k, mask=here, other=1) == 0)
    outside = there & ((ids < 0) | (ids >= C))
    poison = tl.where(tl.max(outside.to(tl.int32), axis=0) > 0, float("nan"), 0.0)
    there = there & (outside == 0)
    ids = tl.where(there, ids, 0)
    v = tl.where(there, tl.load(z_row + ids, mask=there & counts, other=0.0).to(tl.float32), NOTHING)
    target = tl.load(logy + row * K + k, mask=here, other=NOTHING)
    by_tau = LOG2_E / tau
    repeated = mark_row(words_row, ids, there, words, BLOCK // 8)
    octets, lane = tl.arange(0, BLOCK // OCTET)[:, None] * OCTET, tl.arange(0, OCTET)[None, :]
    top = tl.full([BLOCK // OCTET], NOTHING, tl.float32)
    total = tl.zeros([BLOCK // OCTET], tl.float32)
    first = HELD * BLOCK
    last = first + (C - first) // BLOCK * BLOCK
    if last < C:
        tail = tl.load(z_row + last + octets + lane, mask=last + octets + lane < C, other=NOTHING).to(tl.float32)
        top, total = _sum_up(tail, _dirty(words_row, last + octets, C, True), top, total, by_tau)
    for back in tl.range(first, last, BLOCK, num_stages=1):  # what is read ahead has no registers left
        start = first + last - BLOCK - back
        block = tl.load(z_row + start + octets + lane, eviction_policy="evict_last").to(tl.float32)
        top, total = _sum_up(block, _dirty(words_row, start + octets, C, False), top, total, by_tau)
    held = ()
    for piece in tl.static_range(HELD):
        kept = tl.load(z_row + piece * BLOCK + octets + lane, eviction_policy="evict_first")
        dirty = _dirty(words_row, piece * BLOCK + octets, C, False)
        top, total = _sum_up(kept.to(tl.float32), dirty, top, total, by_tau)
        held = held + (kept,)  # type: ignore[assignment]  # noqa: RUF005  # Triton has no starred tuples
    # octets with kept classes: each is summed up by the lowest entry in it that repeats none
    byte = (tl.load(words_row + ids // 32, mask=there, other=0) >> (ids // 8 * 8 % 32)) & 255
    mine = there & (repeated == 0) & ((byte & ((1 << (ids % 8)) - 1)) == 0)
    j = (ids // 8 * 8)[:, None] + lane
    other = mine[:, None] & (j < C) & (((byte[:, None] >> lane) & 1) == 0)
    z = tl.load(z_row + j, mask=other, other=NOTHING).to(tl.float32)
    best = tl.maximum(tl.max(top, axis=0), tl.max(tl.max(z, axis=1), axis=0))
    safe = tl.where(best == NOTHING, 0.0, best)
    sums = tl.sum(total * tl.exp2((top - safe) * by_tau), axis=0)
    sums += tl.sum(tl.sum(tl.exp2((z - safe) * by_tau), axis=1), axis=0)
    sums = tl.where(best == NOTHING, 1.0, sums)
    largest = tl.maximum(tl.max(v, axis=0), best)
    largest = tl.where(largest == NOTHING, 0.0, largest)
    rest = tl.where(best == NOTHING, NOTHING, best - largest + tau * tl.log(sums))
    nothing = tl.zeros([KP], tl.float32)
    loss, g, g_rest = bucket_problem(
        v - largest, rest, target, tl.load(logy_rest + row), nothing, 1.0, T, ENTROPY, False, False
    )
    if tl.max(repeated, axis=0) > 0:
        g = together(g, ids, there, K)
    factor = tl.load(scale + row) + poison
    tl.store(losses + row, tl.where(counts, loss * factor, 0.0))
    g = tl.where(counts, g * factor, 0.0)
    g_rest = tl.where(counts, g_rest * factor / sums, 0.0)
    nought, shift = tl.load(zero), safe * by_tau
    for piece in tl.static_range(HELD):
        slope = _slope(_again(held[piece], nought), g_rest, shift, by_tau, kind)
        tl.store(g_row + piece * BLOCK + octets + lane, slope, eviction_policy="evict_first")
    for start in tl.range(first, last, BLOCK, num_stages=1):
        again = tl.load(z_row + start + octets + lane, eviction_policy="evict_first")
        tl.store(
            g_row + start + octets + lane, _slope(again, g_rest, shift, by_tau, kind), eviction_policy="evict_first"
        )
    if last < C:
        at = last + octets + lane
        beyond = tl.load(z_row + at, mask=at < C, other=0.0)
        tl.store(g_row + at, _slope(beyond, g_rest, shift, by_tau, kind), mask=at < C)
    tl.debug_barrier()  # the kept classes are stored over what the sweep left in their places
    tl.store(g_row + ids, g.to(kind), mask=there)


@triton.jit
def rescale(gradient, upstream, C, gradient_stride, upstream_stride, BLOCK: tl.constexpr):
    """Multiply rows by factors; nothing is read or written where a factor is one, which the host need not know."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(upstream + row * upstream_stride)
    if factor != 1.0:
        for start in range(0, C, BLOCK):
            j = start + tl.arange(0, BLOCK)
            g = tl.load(gradient + row * gradient_stride + j, mask=j < C, other=0.0).to(tl.float32)
            tl.store(gradient + row * gradient_stride + j, (g * factor).to(gradient.dtype.element_ty), mask=j < C)
