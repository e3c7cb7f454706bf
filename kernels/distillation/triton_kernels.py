"""The distillation losses as Triton kernels: a program to a row, or to a part of one.

Sparse labels: a bit per class says which classes are kept; a program sets those of what it works on. `solve_rows` sums up
the exponentials of all others, without ever subtracting the kept part from the whole, solves the problem over the buckets
in registers, and leaves of it a few numbers a row, from which `spread_rows` makes the gradient in the backward pass: what
comes from above is a factor there and no reading of its own. It writes the others' gradient, and after a barrier the kept
classes' over it, so that all of both moves 16 bytes at a time. Sums are kept for every OCTET of neighbouring classes, which
one thread reads at once: an exponential a class, and one more where a maximum moves. Dense labels: value and gradient
together; the row stays in registers where it fits, else it is swept twice.

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
def bucket_problem(
    v, v_rest, logy, logy_rest, flip, a, T, ENTROPY: tl.constexpr, SLAM: tl.constexpr, FORWARD: tl.constexpr
):
    """Loss of one row, and its derivatives by the kept buckets' logits and by the rest's."""
    NOTHING = -float("inf")
    u, u_rest = v / T, v_rest / T
    top = tl.maximum(tl.max(u, axis=0), u_rest)
    top = tl.where(top == NOTHING, 0.0, top)  # where no bucket exists, the loss is 0
    e, e_rest = tl.exp(u - top), tl.exp(u_rest - top)
    total = tl.sum(e, axis=0) + e_rest
    total = tl.where(total == 0.0, 1.0, total)
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
    """Set a row's bits of the classes `ids` where they are `there`, and clear all others; ends with a barrier.

    Gives one for an entry whose class another one has named, of all that name it for all but one.
    """
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        tl.store(words_row + word, tl.zeros([BLOCK], tl.int32), mask=word < words)
    tl.debug_barrier()
    bit = tl.full(ids.shape, 1, tl.int32) << (ids % 32)
    before = tl.atomic_or(words_row + ids // 32, bit, mask=there, sem="relaxed")
    tl.debug_barrier()
    return (there & ((before & bit) != 0)).to(tl.int32)


@triton.jit
def together(g, ids, there, K: tl.constexpr):
    """Give each entry the sum of the gradients of all entries of its class."""
    k = tl.arange(0, g.shape[0])
    sums = tl.zeros(g.shape, tl.float32)
    for entry in range(K):
        one = tl.sum(tl.where(k == entry, ids, 0), axis=0)
        sums = tl.where(k == entry, tl.sum(tl.where(there & (ids == one), g, 0.0), axis=0), sums)
    return sums


@triton.jit
def mark_rows(classes, bits, first, size, words, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    """Set the bits of the kept classes first to first + size, counted from the first of them."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    ids = tl.load(classes + row * K + k, mask=k < K, other=-1) - first
    mark_row(bits + row * words, ids, (k < K) & (ids >= 0) & (ids < size), words, BLOCK)


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
    losses, rests, rest_slopes, kept_slopes, C, row_stride, words, T, tau,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
    BIAS: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    REST: tl.constexpr, ENTROPY: tl.constexpr, SLAM: tl.constexpr, FORWARD: tl.constexpr, ADD: tl.constexpr,
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
    ids = tl.load(classes + row * K + k, mask=here, other=0)
    there = here
    if PADDED:
        there = there & (tl.load(padding + row * K + k, mask=here, other=1) == 0)
    outside = there & ((ids < 0) | (ids >= C))
    poison = tl.where(tl.max(outside.to(tl.int32), axis=0) > 0, float("nan"), 0.0)
    there = there & (outside == 0)
    ids = tl.where(there, ids, 0)
    v = tl.load(z_row + ids, mask=there & counts, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + ids, mask=there, other=0.0).to(tl.float32)
    v = tl.where(there, v, NOTHING)
    target = tl.load(logy + row * K + k, mask=here, other=NOTHING)
    flips, a = tl.zeros([KP], tl.float32), 1.0
    if SLAM:
        flips = tl.load(flip + row * K + k, mask=here, other=0.0)
        a = tl.load(accuracy + row)
    rest, target_rest, best, sums, twice = NOTHING, NOTHING, NOTHING, 1.0, 0
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
        target_rest = tl.load(logy_rest + row)
    largest = tl.where(largest == NOTHING, 0.0, largest)
    loss, g, g_rest = bucket_problem(v - largest, rest, target, target_rest, flips, a, T, ENTROPY, SLAM, FORWARD)
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


@triton.jit
def dense_rows(
    logits, logy, flip, accuracy, scale, valid, losses, gradient,
    C, row_stride, T,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr, SLAM: tl.constexpr, FORWARD: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One row of [B, C] logits with a target for every class; C is at most BLOCK."""
    NOTHING = -float("inf")
    row = tl.program_id(0).to(tl.int64)
    counts = tl.load(valid + row) != 0
    j = tl.arange(0, BLOCK)
    here = j < C
    v = tl.load(logits + row * row_stride + j, mask=here & counts, other=0.0).to(tl.float32)
    v = tl.where(here, v, NOTHING)
    largest = tl.max(v, axis=0)
    v -= tl.where(largest == NOTHING, 0.0, largest)
    target = tl.load(logy + row * C + j, mask=here, other=NOTHING)
    flips, a = tl.zeros([BLOCK], tl.float32), 1.0
    if SLAM:
        flips = tl.load(flip + row * C + j, mask=here, other=0.0)
        a = tl.load(accuracy + row)
    loss, g, _ = bucket_problem(v, NOTHING, target, NOTHING, flips, a, T, ENTROPY, SLAM, FORWARD)
    factor = tl.where(counts, tl.load(scale + row), 0.0)
    loss, g = tl.where(counts, loss * factor, 0.0), tl.where(counts, g * factor, 0.0)
    if ADD:
        loss += tl.load(losses + row)
        g += tl.load(gradient + row * C + j, mask=here, other=0.0).to(tl.float32)
    tl.store(losses + row, loss)
    tl.store(gradient + row * C + j, g.to(gradient.dtype.element_ty), mask=here)


@triton.jit
def dense_sweeps(
    logits, logy, scale, valid, losses, gradient, C, row_stride, T,
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
        z = tl.load(z_row + j, mask=here, other=NOTHING, eviction_policy="evict_last").to(tl.float32)
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
        z = tl.load(z_row + j, mask=here, other=NOTHING, eviction_policy="evict_first").to(tl.float32)
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
