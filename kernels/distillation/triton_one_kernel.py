"""Value and gradient of sparse labels in one kernel, which keeps part of the row in registers and finds the rest in the L2.

A program sums its row up from the end to the beginning, holds the first HELD blocks of it as the 16-bit numbers that they
are, and writes the gradient from these and from what the cache still has: one reading and one writing of memory where the
multiprocessors' rows fit the cache together. The label may be prepared here (GIVEN). Whatever the factor from above is,
`rescale` looks at it on the device. Not measured on a GPU yet.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from distilbeam.kernels.distillation.triton_buckets import (
    LOG2_E,
    OCTET,
    row_scale,
)
from distilbeam.kernels.distillation.triton_octets import (
    dirty,
    marked_label,
    nothing_summed,
    on_octet,
    places_at_edge,
    row_at,
    row_solved,
    slope_of,
    sum_up,
    whole_rest,
)


@triton.jit
def _again(z, nought):
    """The same numbers, of which the compiler does not know it, so that it keeps 16 bits of each and not 32."""
    return (z.to(tl.int16, bitcast=True) ^ nought.to(tl.int16)).to(z.dtype, bitcast=True)


@triton.jit(do_not_specialize=["nought", "share"])
def value_and_gradient(
    logits, bits, classes, padding, logy, logy_rest, weight, normalizer, valid, losses, gradient,
    C, row_stride, gradient_stride, words, T, tau, share, ignore, nought, mixture,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
    PADDED: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, DIVIDED: tl.constexpr, ENTROPY: tl.constexpr,
    GIVEN: tl.constexpr, TAIL: tl.constexpr, BUCKET: tl.constexpr, HARD: tl.constexpr, SHIFTED: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """One row of [B, C] 16-bit logits with a rest bucket; HELD * BLOCK is at most its whole octets; `nought` is 0.

    The gradient may take the logits' place. SHIFTED: rows may begin anywhere, those of the gradient where the logits' do.
    """
    kind = gradient.dtype.element_ty
    row, head, body, z_body, words_row = row_at(logits, bits, C, row_stride, words, SHIFTED)
    g_body = gradient + on_octet(row * gradient_stride, head, SHIFTED)
    counts, ids, there, repeated, v, target, target_rest, poison = marked_label(
        logits, words_row, classes, padding, logy, logy_rest, valid, row, head, C, row_stride, words, T, ignore,
        K, KP, BLOCK, PADDED, MASKED, GIVEN, TAIL, BUCKET, HARD,
    )  # fmt: skip
    by_tau = LOG2_E / tau
    octets, lane, top, total = nothing_summed(BLOCK)
    first = HELD * BLOCK
    last = first + (body - first) // BLOCK * BLOCK
    if last < body:
        tail = tl.load(z_body + last + octets + lane, mask=last + octets < body, other=-float("inf")).to(tl.float32)
        top, total = sum_up(tail, dirty(words_row, last + octets, body, False), top, total, by_tau, False)
    for back in tl.range(first, last, BLOCK, num_stages=1):  # what is read ahead has no registers left
        start = first + last - BLOCK - back
        block = tl.load(z_body + start + octets + lane, eviction_policy="evict_last").to(tl.float32)
        top, total = sum_up(block, dirty(words_row, start + octets, body, True), top, total, by_tau, False)
    held = ()
    for piece in tl.static_range(HELD):
        kept = tl.load(z_body + piece * BLOCK + octets + lane, eviction_policy="evict_first")
        left_out = dirty(words_row, piece * BLOCK + octets, body, True)
        top, total = sum_up(kept.to(tl.float32), left_out, top, total, by_tau, False)
        held = held + (kept,)  # type: ignore[assignment]  # noqa: RUF005  # Triton has no starred tuples
    best, sums, edge = whole_rest(z_body, words_row, ids, there, repeated, head, body, C, top, total, by_tau)
    factor = row_scale(weight, normalizer, share, row, WEIGHTED, DIVIDED) + poison
    loss, g, g_rest = row_solved(
        v, best, sums, target, target_rest, ids, there, repeated, factor, counts, T, tau, mixture, K, ENTROPY, KIND
    )
    tl.store(losses + row, loss)
    for piece in tl.static_range(HELD):
        slope = slope_of(_again(held[piece], nought), g_rest, best, by_tau, kind, False)
        tl.store(g_body + piece * BLOCK + octets + lane, slope, eviction_policy="evict_first")
    for start in tl.range(first, last, BLOCK, num_stages=1):
        again = tl.load(z_body + start + octets + lane, eviction_policy="evict_first")
        slope = slope_of(again, g_rest, best, by_tau, kind, False)
        tl.store(g_body + start + octets + lane, slope, eviction_policy="evict_first")
    if last < body:
        inside = last + octets < body
        beyond = tl.load(z_body + last + octets + lane, mask=inside, other=0.0)
        tl.store(g_body + last + octets + lane, slope_of(beyond, g_rest, best, by_tau, kind, False), mask=inside)
    at, real = places_at_edge(head, body, C)
    tl.store(g_body - OCTET + at, slope_of(edge, g_rest, best, by_tau, kind, False), mask=real)
    tl.debug_barrier()  # the kept classes are stored over what the sweep left in their places
    tl.store(gradient + row * gradient_stride + ids, g.to(kind), mask=there)
