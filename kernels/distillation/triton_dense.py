"""Dense labels as Triton kernels: a row in registers, or swept twice, or swept twice with its label prepared on the way.

`dense_value_and_gradient` reads log-probabilities as they are given, of any floating dtype: its first sweep, from the front,
sums up student and teacher together, the second one, from the back, finds in the cache what the first one saw last. Not
measured on a GPU yet.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from distilbeam.kernels.distillation.triton_buckets import LOG2_E, OCTET, bucket_problem, row_counts, row_scale
from distilbeam.kernels.distillation.triton_divergences import FORWARD_KL, LEAST_MASS, summand_and_slope
from distilbeam.kernels.distillation.triton_octets import octets_of, on_octet, places_at_edge


@triton.jit
def dense_rows(
    logits, logy, flip, accuracy, scale, valid, losses, gradient,
    C, row_stride, T, mixture,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr, SLAM: tl.constexpr, FORWARD: tl.constexpr, ADD: tl.constexpr,
    KIND: tl.constexpr,
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
    loss, g, _ = bucket_problem(v, NOTHING, target, NOTHING, flips, a, T, mixture, ENTROPY, SLAM, FORWARD, KIND)
    factor = tl.where(counts, tl.load(scale + row), 0.0)
    loss, g = tl.where(counts, loss * factor, 0.0), tl.where(counts, g * factor, 0.0)
    if ADD:
        loss += tl.load(losses + row)
        g += tl.load(gradient + row * C + j, mask=here, other=0.0).to(tl.float32)
    tl.store(losses + row, loss)
    tl.store(gradient + row * C + j, g.to(gradient.dtype.element_ty), mask=here)


@triton.jit
def dense_sweeps(
    logits, logy, scale, valid, losses, gradient, C, row_stride, T, mixture,
    BLOCK: tl.constexpr, ENTROPY: tl.constexpr, ADD: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """One row of [B, C] logits with a target for every class, of any length, without SLaM's mixing.

    Divergences other than forward KL sweep the row once more: the sum of their slopes wants the student's distribution first.
    """
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
    if KIND != FORWARD_KL:
        factor = tl.where(of_row >= LEAST_MASS, factor, 0.0)  # without a target there is no loss
        sums = tl.zeros([BLOCK // OCTET], tl.float32)
        for start in range(0, C, BLOCK):
            j = start + octets
            here = (j < C) & counts
            z = tl.load(z_row + j, mask=here, other=NOTHING, eviction_policy="evict_last").to(tl.float32)
            target = tl.load(y_row + j, mask=here, other=NOTHING, eviction_policy="evict_last")
            _, s = summand_and_slope(target, (z - best) / T - whole, z > NOTHING, mixture, KIND)
            sums += tl.sum(s, axis=1)
        slopes = tl.sum(sums, axis=0)
    last = (C - 1) // BLOCK * BLOCK
    for passed in range(0, C, BLOCK):
        j = last - passed + octets
        here = (j < C) & counts
        z = tl.load(z_row + j, mask=here, other=NOTHING, eviction_policy="evict_first").to(tl.float32)
        target = tl.load(y_row + j, mask=here, other=NOTHING, eviction_policy="evict_first")
        logf = tl.where(z == NOTHING, NOTHING, (z - best) / T - whole)
        if KIND != FORWARD_KL:
            d, s = summand_and_slope(target, logf, z > NOTHING, mixture, KIND)
            loss += tl.sum(d, axis=1)
            slope = tl.where(counts, T * factor * (s - tl.exp(logf) * slopes), 0.0)
        else:
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


@triton.jit
def _both(z, label, z_top, z_total, y_top, y_total, y_mass, by_t):
    """Take a block of octets into the maxima and sums of student and teacher; y_mass is of classes that the student has."""
    NOTHING = -float("inf")
    higher = tl.maximum(z_top, tl.max(z, axis=1))
    safe = tl.where(higher == NOTHING, 0.0, higher)
    z_total = z_total * tl.exp2((z_top - safe) * by_t) + tl.sum(tl.exp2((z - safe[:, None]) * by_t), axis=1)
    most = tl.maximum(y_top, tl.max(label, axis=1))
    safe = tl.where(most == NOTHING, 0.0, most)
    e, ratio = tl.exp2((label - safe[:, None]) * by_t), tl.exp2((y_top - safe) * by_t)
    y_mass = y_mass * ratio + tl.sum(tl.where(z == NOTHING, 0.0, e), axis=1)
    return higher, z_total, most, y_total * ratio + tl.sum(e, axis=1), y_mass


@triton.jit
def _loss_and_slope(z, label, z_best, z_log, y_best, y_log, of_row, T, ENTROPY: tl.constexpr):
    """Loss of every class, and its slope, both without the row's factor."""
    NOTHING = -float("inf")
    logf = tl.where(z == NOTHING, NOTHING, (z - z_best) / T - z_log)
    logy = tl.where(z == NOTHING, NOTHING, (label - y_best) / T - y_log)
    y = tl.exp(logy)
    value = -logf
    if ENTROPY:
        value += logy
    return tl.where(y > 0, y * value, 0.0), tl.exp(logf) * of_row - y


@triton.jit(do_not_specialize=["share"])
def dense_value_and_gradient(
    logits, labels, weight, normalizer, valid, losses, gradient, C, row_stride, label_stride, gradient_stride, T, share,
    BLOCK: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr, DIVIDED: tl.constexpr,
    ENTROPY: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """One row of [B, C] logits and of the teacher's log-probabilities, which begin at the same place between two octets."""
    NOTHING = -float("inf")
    kind = gradient.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    head, body = octets_of(row * row_stride, C, SHIFTED)
    z_body = logits + on_octet(row * row_stride, head, SHIFTED)
    y_body = labels + on_octet(row * label_stride, head, SHIFTED)
    g_body = gradient + on_octet(row * gradient_stride, head, SHIFTED)
    counts = row_counts(valid, labels, 0, row, MASKED, False)
    by_t = LOG2_E / T
    octets, lane = tl.arange(0, BLOCK // OCTET)[:, None] * OCTET, tl.arange(0, OCTET)[None, :]
    z_top = tl.full([BLOCK // OCTET], NOTHING, tl.float32)
    z_total = tl.zeros([BLOCK // OCTET], tl.float32)
    y_top, y_total, y_mass = z_top, z_total, z_total
    for start in range(0, body, BLOCK):
        inside = (start + octets < body) & counts
        z = tl.load(z_body + start + octets + lane, mask=inside, other=NOTHING, eviction_policy="evict_last")
        y = tl.load(y_body + start + octets + lane, mask=inside, other=NOTHING, eviction_policy="evict_last")
        z_top, z_total, y_top, y_total, y_mass = _both(
            z.to(tl.float32), y.to(tl.float32), z_top, z_total, y_top, y_total, y_mass, by_t
        )
    at, real = places_at_edge(head, body, C)
    edge = tl.load(z_body - OCTET + at, mask=real & counts, other=NOTHING).to(tl.float32)
    of_edge = tl.load(y_body - OCTET + at, mask=real & counts, other=NOTHING).to(tl.float32)
    z_best = tl.maximum(tl.max(z_top, axis=0), tl.max(tl.max(edge, axis=1), axis=0))
    y_best = tl.maximum(tl.max(y_top, axis=0), tl.max(tl.max(of_edge, axis=1), axis=0))
    z_best, y_best = tl.where(z_best == NOTHING, 0.0, z_best), tl.where(y_best == NOTHING, 0.0, y_best)
    z_sum = tl.sum(z_total * tl.exp2((z_top - z_best) * by_t), axis=0)
    z_sum += tl.sum(tl.sum(tl.exp2((edge - z_best) * by_t), axis=1), axis=0)
    ratio, e = tl.exp2((y_top - y_best) * by_t), tl.exp2((of_edge - y_best) * by_t)
    y_sum = tl.sum(y_total * ratio, axis=0) + tl.sum(tl.sum(e, axis=1), axis=0)
    mass = tl.sum(y_mass * ratio, axis=0) + tl.sum(tl.sum(tl.where(edge == NOTHING, 0.0, e), axis=1), axis=0)
    y_sum = tl.where(y_sum == 0.0, 1.0, y_sum)
    z_log, y_log, of_row = tl.log(z_sum), tl.log(y_sum), mass / y_sum
    factor = tl.where(counts, row_scale(weight, normalizer, share, row, WEIGHTED, DIVIDED), 0.0)
    loss = tl.zeros([BLOCK // OCTET], tl.float32)
    last = (body - 1) // BLOCK * BLOCK
    for passed in range(0, body, BLOCK):
        start = last - passed
        inside = (start + octets < body) & counts
        z = tl.load(z_body + start + octets + lane, mask=inside, other=NOTHING, eviction_policy="evict_first")
        y = tl.load(y_body + start + octets + lane, mask=inside, other=NOTHING, eviction_policy="evict_first")
        part, slope = _loss_and_slope(
            z.to(tl.float32), y.to(tl.float32), z_best, z_log, y_best, y_log, of_row, T, ENTROPY
        )
        loss += tl.sum(part, axis=1)
        slope = tl.where(counts, T * factor * slope, 0.0)
        place = g_body + start + octets + lane
        tl.store(place, slope.to(kind), mask=start + octets < body, eviction_policy="evict_first")
    part, slope = _loss_and_slope(edge, of_edge, z_best, z_log, y_best, y_log, of_row, T, ENTROPY)
    tl.store(g_body - OCTET + at, tl.where(counts, T * factor * slope, 0.0).to(kind), mask=real)
    whole = tl.sum(loss, axis=0) + tl.sum(tl.sum(part, axis=1), axis=0)
    tl.store(losses + row, tl.where(counts, T * T * factor * whole, 0.0))
