"""Sparse labels in two kernels that prepare the label themselves and read rows in whole octets, wherever they begin.

`solve_octets` leaves of a row what `spread_octets` makes its gradient from in the backward pass; with the sum over the rows
that is a step in three launches. Not measured on a GPU yet.
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
    octets_of,
    on_octet,
    places_at_edge,
    row_at,
    row_solved,
    slope_of,
    sum_up,
    whole_rest,
)


@triton.jit(do_not_specialize=["share"])
def solve_octets(
    logits, bits, classes, logy, logy_rest, weight, normalizer, valid, losses, rests, rest_slopes, kept_slopes,
    C, row_stride, words, T, tau, share, ignore, mixture,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr, WEIGHTED: tl.constexpr, DIVIDED: tl.constexpr, ENTROPY: tl.constexpr,
    TAIL: tl.constexpr, BUCKET: tl.constexpr, HARD: tl.constexpr, SHIFTED: tl.constexpr, WIDE: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Solve the problem of a row of [B, C] logits with a label as it was given, and a rest bucket."""
    row, head, body, z_body, words_row = row_at(logits, bits, C, row_stride, words, SHIFTED)
    counts, ids, there, repeated, v, target, target_rest, poison = marked_label(
        logits, words_row, classes, classes, logy, logy_rest, valid, row, head, C, row_stride, words, T, ignore,
        K, KP, BLOCK, False, MASKED, True, TAIL, BUCKET, HARD,
    )  # fmt: skip
    by_tau = LOG2_E / tau
    octets, lane, top, total = nothing_summed(BLOCK)
    for start in range(0, body, BLOCK):
        inside = start + octets < body
        z = tl.load(z_body + start + octets + lane, mask=inside, other=-float("inf")).to(tl.float32)
        top, total = sum_up(z, dirty(words_row, start + octets, body, False), top, total, by_tau, WIDE)
    best, sums, _ = whole_rest(z_body, words_row, ids, there, repeated, head, body, C, top, total, by_tau)
    factor = row_scale(weight, normalizer, share, row, WEIGHTED, DIVIDED) + poison
    loss, g, g_rest = row_solved(
        v, best, sums, target, target_rest, ids, there, repeated, factor, counts, T, tau, mixture, K, ENTROPY, KIND
    )
    tl.store(losses + row, loss)
    tl.store(kept_slopes + row * K + tl.arange(0, KP), g, mask=tl.arange(0, KP) < K)
    tl.store(rests + row, best)
    tl.store(rest_slopes + row, g_rest)


@triton.jit
def spread_octets(
    logits, classes, rests, rest_slopes, kept_slopes, upstream, gradient,
    C, span, row_stride, gradient_stride, upstream_stride, tau,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, SHIFTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Make the gradient of `span` classes of a row's whole octets, times what comes from above; the first part's program
    makes the edge's too. The gradient's rows begin where the logits' do.
    """
    kind = gradient.dtype.element_ty
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = row * row_stride
    head, body = octets_of(begin, C, SHIFTED)
    first = part * span
    size = tl.minimum(span, body - first)
    z_body = logits + on_octet(begin, head, SHIFTED) + first
    g_body = gradient + on_octet(row * gradient_stride, head, SHIFTED) + first
    factor = tl.load(upstream + row * upstream_stride)
    best, g_rest, by_tau = tl.load(rests + row), tl.load(rest_slopes + row) * factor, LOG2_E / tau
    k = tl.arange(0, KP)
    ids = tl.load(classes + row * K + k, mask=k < K, other=-1)
    g = tl.load(kept_slopes + row * K + k, mask=k < K, other=0.0) * factor
    place = ids - head - first
    there = (ids >= 0) & (place >= 0) & (place < size)
    octets, lane = tl.arange(0, BLOCK // OCTET)[:, None] * OCTET, tl.arange(0, OCTET)[None, :]
    for start in range(0, size, BLOCK):
        inside = start + octets < size
        z = tl.load(z_body + start + octets + lane, mask=inside, other=0.0)
        tl.store(g_body + start + octets + lane, slope_of(z, g_rest, best, by_tau, kind, WIDE), mask=inside)
    if part == 0:
        at, real = places_at_edge(head, body, C)
        edge = tl.load(z_body - OCTET + at, mask=real, other=0.0)
        tl.store(g_body - OCTET + at, slope_of(edge, g_rest, best, by_tau, kind, WIDE), mask=real)
        there = there | ((ids >= 0) & (ids < C) & ((ids < head) | (ids >= head + body)))
    tl.debug_barrier()  # the kept classes are stored over what the sweep left in their places
    tl.store(g_body + place, g.to(kind), mask=there)
