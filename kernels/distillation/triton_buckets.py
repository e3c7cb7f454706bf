"""What the Triton kernels of the distillation losses share: a row's label, its bits, and the problem over its buckets.

A label comes prepared (`targets.py`), or, with GIVEN, as the caller gave it: log-probabilities at temperature 1 of any
floating dtype, classes of any integer dtype, negative where an entry is padding, and the log-mass of the tail.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from distilbeam.kernels.distillation.triton_divergences import FORWARD_KL, LEAST_MASS, summand_and_slope

OCTET = tl.constexpr(8)
LOG2_E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-3.4028234663852886e38)  # the log of no probability, of which 0 times it is 0


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
    v, v_rest, logy, logy_rest, flip, a, T, mixture,
    ENTROPY: tl.constexpr, SLAM: tl.constexpr, FORWARD: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
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
    if KIND != FORWARD_KL:
        d, s = summand_and_slope(logy, logf, u > NOTHING, mixture, KIND)
        d_rest, s_rest = summand_and_slope(logy_rest, logf_rest, u_rest > NOTHING, mixture, KIND)
        some = tl.where(tl.sum(y, axis=0) + y_rest >= LEAST_MASS, 1.0, 0.0)  # without a target there is no loss
        loss, slopes = (tl.sum(d, axis=0) + d_rest) * some, tl.sum(s, axis=0) + s_rest
        g, g_rest = (s - f * slopes) * some, (s_rest - f_rest * slopes) * some
    else:
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
def row_counts(valid, classes, ignore, row, MASKED: tl.constexpr, HARD: tl.constexpr):
    """Whether a row takes part: its mask says so, and it has a true class where classes are that."""
    counts = row >= 0
    if MASKED:
        counts = tl.load(valid + row) != 0
    if HARD:
        counts = counts & (tl.load(classes + row) != ignore)
    return counts


@triton.jit
def row_scale(weight, normalizer, share, row, WEIGHTED: tl.constexpr, DIVIDED: tl.constexpr):
    """Factor of a row's loss."""
    factor = share
    if WEIGHTED:
        factor = factor * tl.load(weight + row).to(tl.float32)
    if DIVIDED:
        factor = factor / tl.load(normalizer).to(tl.float32)
    return factor


@triton.jit
def _tail_of(logprobs):
    """log(1 - sum exp(logprobs)), log(1e-7) where rounding leaves nothing; `labels.tail_logmass`."""
    top = tl.max(logprobs, axis=0)
    safe = tl.where(top == -float("inf"), 0.0, top)
    x = tl.minimum(safe + tl.log(tl.sum(tl.exp(logprobs - safe), axis=0)), -1e-7)
    near = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))  # 1 - exp(x) would cancel
    return tl.log(tl.where(x > -0.2, near, 1 - tl.exp(x)))


@triton.jit
def _target_of(
    logprobs, tail, row, there, complete, T,
    K: tl.constexpr, KP: tl.constexpr, TAIL: tl.constexpr, BUCKET: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Log of the target over a row's kept classes and its rest; `targets.prepare` for what a kernel takes.

    TAIL: 0 none, 1 given, 2 what the kept classes leave. BUCKET: the tail is the rest's target. COMPLETE rows keep every class.
    """
    NOTHING = -float("inf")
    kept = tl.where(there, 0.0, NOTHING)
    if not HARD:
        kept = tl.load(logprobs + row * K + tl.arange(0, KP), mask=there, other=NOTHING).to(tl.float32)
    mass = NOTHING
    if TAIL == 1:
        mass = tl.load(tail + row).to(tl.float32)
    if TAIL == 2:
        mass = _tail_of(kept)
    if TAIL > 0:
        mass = tl.where(complete, NOTHING, mass)
    u, u_rest = kept / T, mass / T
    top = tl.maximum(tl.max(u, axis=0), u_rest)
    safe = tl.where(top == NOTHING, 0.0, top)
    total = tl.sum(tl.exp(u - safe), axis=0) + tl.exp(u_rest - safe)
    whole = safe + tl.log(tl.where(total == 0.0, 1.0, total))  # a row of padding alone has no target
    target, target_rest = tl.maximum(u - whole, LEAST), whole * 0.0 + LEAST
    if BUCKET:
        target_rest = tl.maximum(u_rest - whole, LEAST)
    return target, target_rest


@triton.jit
def read_label(
    z_row, bias, classes, padding, logy, logy_rest, row, C, counts, T,
    K: tl.constexpr, KP: tl.constexpr, BIAS: tl.constexpr, PADDED: tl.constexpr, REST: tl.constexpr,
    GIVEN: tl.constexpr, TAIL: tl.constexpr, BUCKET: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Read a row's kept classes, whether each is there, their logits and targets, and the rest's target.

    Also gives NaN where a class does not exist, else 0: nobody has looked at the classes before.
    """
    k = tl.arange(0, KP)
    here = k < K
    ids = tl.load(classes + row * K + k, mask=here, other=0)
    there = here
    if PADDED:
        there = there & (tl.load(padding + row * K + k, mask=here, other=1) == 0)
    if GIVEN and not HARD:
        there = there & (ids >= 0)
    outside = there & counts & ((ids < 0) | (ids >= C))
    poison = tl.where(tl.max(outside.to(tl.int32), axis=0) > 0, float("nan"), 0.0)
    there = there & (ids >= 0) & (ids < C)
    ids = tl.where(there, ids, 0).to(tl.int32)
    v = tl.load(z_row + ids, mask=there & counts, other=0.0).to(tl.float32)
    if BIAS:
        v += tl.load(bias + ids, mask=there, other=0.0).to(tl.float32)
    v = tl.where(there, v, -float("inf"))
    if GIVEN:
        complete = (K >= C) & (tl.sum(there.to(tl.int32), axis=0) == K)
        target, target_rest = _target_of(logy, logy_rest, row, there, complete, T, K, KP, TAIL, BUCKET, HARD)
    else:
        target = tl.load(logy + row * K + k, mask=here, other=-float("inf"))
        target_rest = -float("inf")
        if REST:
            target_rest = tl.load(logy_rest + row)
    return ids, there, v, target, target_rest, poison
