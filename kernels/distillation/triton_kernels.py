"""The distillation losses of sparse labels as Triton kernels: a program to a row, or to a part of one.

A bit per class says which classes are kept; a program sets those of what it works on. `solve_rows` sums up
the exponentials of all others, without ever subtracting the kept part from the whole, solves the problem over the buckets
in registers, and leaves of it a few numbers a row, from which `spread_rows` makes the gradient in the backward pass: what
comes from above is a factor there and no reading of its own. It writes the others' gradient, and after a barrier the kept
classes' over it, so that all of both moves 16 bytes at a time. Sums are kept for every OCTET of neighbouring classes, which
one thread reads at once: an exponential a class, and one more where a maximum moves.

Everything is float32 from the moment it is loaded; the losses are those of reference.py, the gradients of
closed_form.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from distilbeam.kernels.distillation.triton_buckets import LOG2_E, OCTET, bucket_problem, mark_row, read_label, together


@triton.jit
def _others(
    z_row, bias, words_row, start, C, counts,
    BLOCK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Logits of a block of octets, float32 [BLOCK / 8, 8], -inf where a class is kept or does not exist."""
    octet, lane = tl.arange(0, BLOCK // OCTET)[:, None], tl.arange(0, OCTET)[None, :]
    j = start + octet * OCTET + lane
    word = (start + octet * OCTET) // 32
    marks = tl.load(words_row + word, mask=start + octet * OCTET < C, other=0) >> (octet * OCTET % 32)
    z = tl.load(z_row + j, mask=j < C, other=-float("inf")).to(tl.float32)
    if BIAS:
        z += tl.load(bias + j, mask=j < C, other=0.0).to(tl.float32)
    return tl.where((((marks >> lane) & 1) == 0) & counts, z, -float("inf")), j


@triton.jit
def solve_rows(
    logits, bias, bits, classes, padding, logy, logy_rest, flip, accuracy, scale, valid,
    losses, rests, rest_slopes, kept_slopes, C, row_stride, words, T, tau, mixture,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
    BIAS: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    REST: tl.constexpr, ENTROPY: tl.constexpr, SLAM: tl.constexpr, FORWARD: tl.constexpr, ADD: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Solve the problem of a row of [B, C] logits with k kept classes.

    Left for `spread_rows` are the rest's largest logit, +inf where there is no rest, the scaled gradient by the rest's logit
    over the rest's sum, and those by the kept classes' logits, of entries that name one class each their sum. A class that
    does not exist makes all of them NaN: nobody has looked at the classes before.
    """
    NOTHING = -float("inf")
    row = tl.program_id(0).to(tl.int64)
    z_row, words_row = logits + row * row_stride, bits + row * words
    counts = row >= 0
    if MASKED:
        counts = tl.load(valid + row) != 0
    k = tl.arange(0, KP)
    here = k < K
    ids, there, v, target, target_rest, poison = read_label(
        z_row, bias, classes, padding, logy, logy_rest, row, C, counts, T,
        K, KP, BIAS, PADDED, REST, False, 0, False, False,
    )  # fmt: skip
    flips, a = tl.zeros([KP], tl.float32), 1.0
    if SLAM:
        flips = tl.load(flip + row * K + k, mask=here, other=0.0)
        a = tl.load(accuracy + row)
    rest, best, sums, twice = NOTHING, NOTHING, 1.0, 0
    by_tau = LOG2_E / tau  # exponentials are powers of two, which the hardware has
    if REST or K > 1:
        twice = tl.max(mark_row(words_row, ids, there, words, BLOCK // 8), axis=0)
    largest = tl.max(v, axis=0)  # logits are counted from it: what all have in common takes no digits from them
    if REST:
        top = tl.full([BLOCK // OCTET], NOTHING, tl.float32)
        total = tl.zeros([BLOCK // OCTET], tl.float32)
        for start in range(0, C, BLOCK):  # a maximum and a sum in every octet: one reduction over all at the end
            z, _ = _others(z_row, bias, words_row, start, C, counts, BLOCK, BIAS)
            higher = tl.maximum(top, tl.max(z, axis=1))
            safe = tl.where(higher == NOTHING, 0.0, higher)
            total = total * tl.exp2((top - safe) * by_tau) + tl.sum(tl.exp2((z - safe[:, None]) * by_tau), axis=1)
            top = higher
        best = tl.max(top, axis=0)
        safe_best = tl.where(best == NOTHING, 0.0, best)
        sums = tl.sum(total * tl.exp2((top - safe_best) * by_tau), axis=0)
        sums = tl.where(best == NOTHING, 1.0, sums)
        largest = tl.maximum(largest, best)
        largest = tl.where(largest == NOTHING, 0.0, largest)
        rest = tl.where(best == NOTHING, NOTHING, best - largest + tau * tl.log(sums))
    largest = tl.where(largest == NOTHING, 0.0, largest)
    loss, g, g_rest = bucket_problem(
        v - largest, rest, target, target_rest, flips, a, T, mixture, ENTROPY, SLAM, FORWARD, KIND
    )
    if twice > 0:
        g = together(g, ids, there, K)
    factor = tl.where(counts, tl.load(scale + row), 0.0) + poison
    loss = tl.where(counts, loss * factor, 0.0)
    if ADD:
        loss += tl.load(losses + row)
    tl.store(losses + row, loss)
    tl.store(kept_slopes + row * K + k, tl.where(counts, g * factor, 0.0), mask=here)
    if REST:
        tl.store(rests + row, tl.where(best == NOTHING, float("inf"), best))
        tl.store(rest_slopes + row, tl.where(counts, g_rest * factor / sums, 0.0))


@triton.jit
def spread_rows(
    logits, bias, bits, classes, padding, rests, rest_slopes, kept_slopes, upstream, valid, gradient,
    C, span, row_stride, gradient_stride, upstream_stride, words, tau,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
    BIAS: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    REST: tl.constexpr, SCALED: tl.constexpr, MARKED: tl.constexpr, IN_PLACE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Make the gradient of `span` classes of a row, times what comes from above where SCALED.

    MARKED: the bits are those that `solve_rows` left. IN_PLACE: the gradient takes the place of dense logits, in their
    dtype or in a narrower one from the row's beginning on; a block is read before it, or what lies before it, is written,
    which wants one program to a row.
    """
    NOTHING = -float("inf")
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * span
    size = tl.minimum(span, C - first)
    z_row = logits + row * row_stride + first
    g_row = gradient + row * gradient_stride + first
    words_row = bits + (row * tl.num_programs(1) + tl.program_id(1)) * words
    counts = row >= 0
    if MASKED:
        counts = tl.load(valid + row) != 0
    k = tl.arange(0, KP)
    ids = tl.load(classes + row * K + k, mask=k < K, other=-1) - first
    there = (k < K) & (ids >= 0) & (ids < size)
    if PADDED:
        there = there & (tl.load(padding + row * K + k, mask=there, other=1) == 0)
    ids = tl.where(there, ids, 0)
    factor = 1.0
    if SCALED:
        factor = tl.load(upstream + row * upstream_stride)
    g = tl.load(kept_slopes + row * K + k, mask=there, other=0.0) * factor
    by_tau = LOG2_E / tau
    if REST:
        shift, g_rest = tl.load(rests + row), tl.load(rest_slopes + row) * factor
        if not MARKED:
            mark_row(words_row, ids, there, words, BLOCK // 8)
    else:
        poison = 0.0 * tl.sum(tl.load(kept_slopes + row * K + k, mask=k < K, other=0.0), axis=0)
    for start in range(0, size, BLOCK):
        if REST:
            z, j = _others(z_row, bias + first, words_row, start, size, counts, BLOCK, BIAS)
            slope = tl.where(z == NOTHING, 0.0, g_rest * tl.exp2((z - shift) * by_tau))
        else:
            j = start + tl.arange(0, BLOCK // OCTET)[:, None] * OCTET + tl.arange(0, OCTET)[None, :]
            slope = tl.zeros([BLOCK // OCTET, OCTET], tl.float32) + poison
        if ADD:
            slope += tl.load(g_row + j, mask=j < size, other=0.0).to(tl.float32)
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(g_row + j, slope.to(gradient.dtype.element_ty), mask=j < size)
    tl.debug_barrier()  # the kept classes are stored over the zeros that the sweep left in their places
    if ADD:
        g += tl.load(g_row + ids, mask=there, other=0.0).to(tl.float32)
        tl.debug_barrier()  # entries of one class have one sum, which each of them stores
    tl.store(g_row + ids, g.to(gradient.dtype.element_ty), mask=there)
