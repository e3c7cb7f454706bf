"""The distillation losses as Triton kernels: value and gradient of a row by one program.

Sparse labels: a bit per class says which classes are kept; the program sets its row's. A first sweep over the row sums
up the exponentials of all others, without ever subtracting the kept part from the whole; the problem over the buckets is
solved in registers; a second sweep, backwards through what the cache still holds, writes the others' gradient, and after
a barrier the kept classes' is written over it, so that both sweeps move 16 bytes at a time. Sums are kept for every OCTET of
neighbouring classes, which one thread reads at once: an exponential a class, and one more where a maximum moves. Dense
labels: the row stays in registers where it fits, else it is swept twice, too.

Everything is float32 from the moment it is loaded; the losses are those of reference.py, the gradients of
closed_form.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

OCTET = tl.constexpr(8)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _log_mix(logf, candidate, flip, a, FORWARD: tl.constexpr):
    """log(mix), and for "forward" the exponent taken out of the candidates' probabilities."""
    shift = 0.0
    if FORWARD:
        shift = tl.max(tl.where(candidate, logf, -float("inf")), axis=0)
        shift = tl.where(shift == -float("inf"), 0.0, shift)
    f = tl.where(candidate, tl.exp(logf - shift), 0.0)
    reach = 1.0
    if FORWARD:
        reach = tl.sum(f, axis=0)
    mixed = tl.where(candidate, a * f + flip * (reach - f), 1.0)
    return tl.where(candidate, shift + tl.log(mixed), tl.log(a) + logf), shift


@triton.jit
def _bucket_problem(
    v, v_rest, logy, logy_rest, flip, a, T, ENTROPY: tl.constexpr, SLAM: tl.constexpr, FORWARD: tl.constexpr
):
    """Loss of one row, and its derivatives by the kept buckets' logits and by the rest's."""
    NOTHING = -float("inf")
    u, u_rest = v / T, v_rest / T
    top = tl.maximum(tl.max(u, axis=0), u_rest)
    e, e_rest = tl.exp(u - top), tl.exp(u_rest - top)
    total = tl.sum(e, axis=0) + e_rest
    f, f_rest = e / total, e_rest / total
    logf, logf_rest = u - top - tl.log(total), u_rest - top - tl.log(total)
    y = tl.where(v == NOTHING, 0.0, tl.exp(logy))
    y_rest = tl.where(v_rest == NOTHING, 0.0, tl.exp(logy_rest))
    logmix, logmix_rest = logf, logf_rest
    if SLAM:
        candidate = flip > 0
        logf = tl.maximum(logf, -3.0e38)
        logmix, shift = _log_mix(logf, candidate, flip, a, FORWARD)
        logmix_rest = tl.log(a) + logf_rest
    value, value_rest = -logmix, -logmix_rest
    if ENTROPY:
        value, value_rest = value + logy, value_rest + logy_rest
    loss = tl.sum(tl.where(y > 0, y * value, 0.0), axis=0) + tl.where(y_rest > 0, y_rest * value_rest, 0.0)
    if SLAM:
        pull = -y * tl.exp(tl.where(y > 0, logf - logmix, 0.0)) * (a - flip)
        if FORWARD:
            shared = tl.sum(y * flip * tl.exp(tl.where(candidate, shift - logmix, 0.0)), axis=0)
            pull -= tl.where(candidate, tl.exp(logf - shift), 0.0) * shared
        pull_rest = -y_rest  # mix is a f there
        pulls = tl.sum(pull, axis=0) + pull_rest
        g, g_rest = pull - f * pulls, pull_rest - f_rest * pulls
    else:
        mass = tl.sum(y, axis=0) + y_rest
        g, g_rest = f * mass - y, f_rest * mass - y_rest
    return T * T * loss, T * g, T * g_rest


@triton.jit
def mark_row(words_row, ids, there, words, BLOCK: tl.constexpr):
    """Set a row's bits of the classes `ids` where they are `there`, and clear all others; ends with a barrier."""
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        tl.store(words_row + word, tl.zeros([BLOCK], tl.int32), mask=word < words)
    tl.debug_barrier()
    bit = tl.full(ids.shape, 1, tl.int32) << (ids % 32)
    tl.atomic_or(words_row + ids // 32, bit, mask=there, sem="relaxed")
    tl.debug_barrier()


@triton.jit
def mark_rows(classes, bits, first, size, words, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    """Set the bits of the kept classes first to first + size, counted from the first of them."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    ids = tl.load(classes + row * K + k, mask=k < K, other=-1) - first
    mark_row(bits + row * words, ids, (k < K) & (ids >= 0) & (ids < size), words, BLOCK)


@triton.jit
def _others(
    z_row, bias, words_row, start, C, column_stride, counts,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """Logits of a block of octets, float32 [BLOCK / 8, 8], -inf where a class is kept or does not exist."""
    octet, lane = tl.arange(0, BLOCK // OCTET)[:, None], tl.arange(0, OCTET)[None, :]
    j = start + octet * OCTET + lane
    word = (start + octet * OCTET) // 32
    marks = tl.load(words_row + word, mask=start + octet * OCTET < C, other=0) >> (octet * OCTET % 32)
    z = tl.load(z_row + j * column_stride, mask=j < C, other=-float("inf"), eviction_policy=POLICY).to(tl.float32)
    if BIAS:
        z += tl.load(bias + j, mask=j < C, other=0.0).to(tl.float32)
    return tl.where((((marks >> lane) & 1) == 0) & counts, z, -float("inf")), j


@triton.jit
def sparse_rows(
    logits, bias, bits, classes, padding, logy, logy_rest, flip, accuracy, scale, valid, losses, gradient,
    C, row_stride, column_stride, gradient_stride, words, T, tau,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, IN_PLACE: tl.constexpr,
    REST: tl.constexpr, ENTROPY: tl.constexpr, SLAM: tl.constexpr, FORWARD: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One row of [B, C] logits with k kept classes; `classes` repeats the row's first where `padding` is set.

    IN_PLACE: the gradient takes the place of dense logits, in their dtype or in a narrower one from the row's beginning
    on; a block is read before it, or what lies before it, is written.
    """
    NOTHING = -float("inf")
    row = tl.program_id(0).to(tl.int64)
    z_row, g_row, words_row = logits + row * row_stride, gradient + row * gradient_stride, bits + row * words
    counts = tl.load(valid + row) != 0
    k = tl.arange(0, KP)
    here = k < K
    ids = tl.load(classes + row * K + k, mask=here, other=0)
    absent = (tl.load(padding + row * K + k, mask=here, other=1) != 0) | (k >= K)
    v = tl.load(z_row + ids * column_stride, mask=here & counts, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + ids, mask=here, other=0.0).to(tl.float32)
    v = tl.where(absent, NOTHING, v)
    target = tl.load(logy + row * K + k, mask=here, other=NOTHING)
    flips, a = tl.zeros([KP], tl.float32), 1.0
    if SLAM:
        flips = tl.load(flip + row * K + k, mask=here, other=0.0)
        a = tl.load(accuracy + row)
    rest, target_rest = NOTHING, NOTHING
    by_tau = LOG2_E / tau  # exponentials are powers of two, which the hardware has
    if REST:
        mark_row(words_row, ids, here, words, BLOCK // 8)
        top = tl.full([BLOCK // OCTET], NOTHING, tl.float32)
        total = tl.zeros([BLOCK // OCTET], tl.float32)
        for start in range(0, C, BLOCK):  # a maximum and a sum in every octet: one reduction over all at the end
            z, _ = _others(z_row, bias, words_row, start, C, column_stride, counts, BLOCK, BIAS, "evict_last")
            higher = tl.maximum(top, tl.max(z, axis=1))
            safe = tl.where(higher == NOTHING, 0.0, higher)
            total = total * tl.exp2((top - safe) * by_tau) + tl.sum(tl.exp2((z - safe[:, None]) * by_tau), axis=1)
            top = higher
        best = tl.max(top, axis=0)
        safe_best = tl.where(best == NOTHING, 0.0, best)
        rest = best + tau * tl.log(tl.sum(total * tl.exp2((top - safe_best) * by_tau), axis=0))
        rest = tl.where(best == NOTHING, NOTHING, rest)
        target_rest = tl.load(logy_rest + row)
    loss, g, g_rest = _bucket_problem(v, rest, target, target_rest, flips, a, T, ENTROPY, SLAM, FORWARD)
    factor = tl.where(counts, tl.load(scale + row), 0.0)
    loss = tl.where(counts, loss * factor, 0.0)
    g, g_rest = tl.where(counts, g * factor, 0.0), tl.where(counts, g_rest * factor, 0.0)
    if ADD:
        loss += tl.load(losses + row)
    tl.store(losses + row, loss)
    shift = tl.where(rest == NOTHING, float("inf"), rest)
    last = (C - 1) // BLOCK * BLOCK
    for passed in range(0, C, BLOCK):
        # backwards, from what was read last and is in the cache yet
        start = passed if IN_PLACE else last - passed
        if REST:
            z, j = _others(z_row, bias, words_row, start, C, column_stride, counts, BLOCK, BIAS, "evict_first")
            slope = tl.where(z == NOTHING, 0.0, g_rest * tl.exp2((z - shift) * by_tau))
        else:
            j = start + tl.arange(0, BLOCK // OCTET)[:, None] * OCTET + tl.arange(0, OCTET)[None, :]
            slope = tl.zeros([BLOCK // OCTET, OCTET], tl.float32)
        if ADD:
            slope += tl.load(g_row + j, mask=j < C, other=0.0).to(tl.float32)
        if IN_PLACE:
            tl.debug_barrier()
        tl.store(g_row + j, slope.to(gradient.dtype.element_ty), mask=j < C, eviction_policy="evict_first")
    tl.debug_barrier()  # the kept classes are stored over the zeros that the sweep left in their places
    if ADD:
        g += tl.load(g_row + ids, mask=~absent, other=0.0).to(tl.float32)
    tl.store(g_row + ids, g.to(gradient.dtype.element_ty), mask=~absent)


@triton.jit
def dense_rows(
    logits, logy, flip, accuracy, scale, valid, losses, gradient,
    C, row_stride, column_stride, T,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr, SLAM: tl.constexpr, FORWARD: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One row of [B, C] logits with a target for every class; C is at most BLOCK."""
    NOTHING = -float("inf")
    row = tl.program_id(0).to(tl.int64)
    counts = tl.load(valid + row) != 0
    j = tl.arange(0, BLOCK)
    here = j < C
    v = tl.load(logits + row * row_stride + j * column_stride, mask=here & counts, other=0.0).to(tl.float32)
    v = tl.where(here, v, NOTHING)
    target = tl.load(logy + row * C + j, mask=here, other=NOTHING)
    flips, a = tl.zeros([BLOCK], tl.float32), 1.0
    if SLAM:
        flips = tl.load(flip + row * C + j, mask=here, other=0.0)
        a = tl.load(accuracy + row)
    loss, g, _ = _bucket_problem(v, NOTHING, target, NOTHING, flips, a, T, ENTROPY, SLAM, FORWARD)
    factor = tl.where(counts, tl.load(scale + row), 0.0)
    loss, g = tl.where(counts, loss * factor, 0.0), tl.where(counts, g * factor, 0.0)
    if ADD:
        loss += tl.load(losses + row)
        g += tl.load(gradient + row * C + j, mask=here, other=0.0).to(tl.float32)
    tl.store(losses + row, loss)
    tl.store(gradient + row * C + j, g.to(gradient.dtype.element_ty), mask=here)


@triton.jit
def dense_sweeps(
    logits, logy, scale, valid, losses, gradient, C, row_stride, column_stride, T,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One row of [B, C] logits with a target for every class, of any length, without SLaM's mixing."""
    NOTHING = -float("inf")
    row = tl.program_id(0).to(tl.int64)
    z_row, y_row, g_row = logits + row * row_stride, logy + row * C, gradient + row * C
    counts = tl.load(valid + row) != 0
    by_t = LOG2_E / T
    octets = tl.arange(0, BLOCK // OCTET)[:, None] * OCTET + tl.arange(0, OCTET)[None, :]
    top = tl.full([BLOCK // OCTET], NOTHING, tl.float32)
    total, mass = tl.zeros([BLOCK // OCTET], tl.float32), tl.zeros([BLOCK // OCTET], tl.float32)
    for start in range(0, C, BLOCK):
        j = start + octets
        here = (j < C) & counts
        z = tl.load(z_row + j * column_stride, mask=here, other=NOTHING, eviction_policy="evict_last").to(tl.float32)
        target = tl.load(y_row + j, mask=here, other=NOTHING, eviction_policy="evict_last")
        higher = tl.maximum(top, tl.max(z, axis=1))
        safe = tl.where(higher == NOTHING, 0.0, higher)
        total = total * tl.exp2((top - safe) * by_t) + tl.sum(tl.exp2((z - safe[:, None]) * by_t), axis=1)
        mass += tl.sum(tl.where(z == NOTHING, 0.0, tl.exp(target)), axis=1)
        top = higher
    best = tl.max(top, axis=0)
    best = tl.where(best == NOTHING, 0.0, best)
    whole = tl.log(tl.sum(total * tl.exp2((top - best) * by_t), axis=0))
    of_row = tl.sum(mass, axis=0)
    factor = tl.where(counts, tl.load(scale + row), 0.0)
    loss = tl.zeros([BLOCK // OCTET], tl.float32)
    last = (C - 1) // BLOCK * BLOCK
    for passed in range(0, C, BLOCK):
        j = last - passed + octets
        here = (j < C) & counts
        z = tl.load(z_row + j * column_stride, mask=here, other=NOTHING, eviction_policy="evict_first").to(tl.float32)
        target = tl.load(y_row + j, mask=here, other=NOTHING, eviction_policy="evict_first")
        logf = tl.where(z == NOTHING, NOTHING, (z - best) / T - whole)
        y = tl.where(z == NOTHING, 0.0, tl.exp(target))
        value = -logf
        if ENTROPY:
            value += target
        loss += tl.sum(tl.where(y > 0, y * value, 0.0), axis=1)
        slope = tl.where(counts, T * factor * (tl.exp(logf) * of_row - y), 0.0)
        if ADD:
            slope += tl.load(g_row + j, mask=j < C, other=0.0).to(tl.float32)
        tl.store(g_row + j, slope.to(gradient.dtype.element_ty), mask=j < C, eviction_policy="evict_first")
    sum_of_row = tl.where(counts, T * T * factor * tl.sum(loss, axis=0), 0.0)
    if ADD:
        sum_of_row += tl.load(losses + row)
    tl.store(losses + row, sum_of_row)
