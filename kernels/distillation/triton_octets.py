"""Rows of logits in octets of 16 bytes, wherever a row begins: what the kernels that read whole octets alone share.

A row of an odd number of 16-bit logits begins anywhere between two addresses that 16 divides. Its whole octets are read and
written at once; what lies before the first and behind the last, at most seven classes each, is the row's edge. A class j has
the place j - head + 8, so that the first octet of places is the front edge; a bit per place says which classes are kept.
An octet that holds a kept class is left out of the sweep, which then needs no test for every class, and is summed up by
itself afterwards, as is the edge.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from distilbeam.kernels.distillation.triton_buckets import (
    OCTET,
    bucket_problem,
    mark_row,
    read_label,
    row_counts,
    together,
)


@triton.jit
def octets_of(start, C, SHIFTED: tl.constexpr):
    """How many classes lie before the first whole octet of a row that begins at `start`, and how many whole octets hold."""
    head = 0
    if SHIFTED:
        head = tl.minimum((8 - start % OCTET) % OCTET, C).to(tl.int32)
    return head, (C - head) // OCTET * OCTET


@triton.jit
def on_octet(start, head, SHIFTED: tl.constexpr):
    """Where a row's first whole octet lies, which the compiler is told."""
    place = start
    if SHIFTED:
        place = tl.multiple_of(start + head, 8)
    return place


@triton.jit
def row_at(logits, bits, C, row_stride, words, SHIFTED: tl.constexpr):
    """A program's row, its head and its body, and where its whole octets and the words of its bits lie."""
    row = tl.program_id(0).to(tl.int64)
    begin = row * row_stride
    head, body = octets_of(begin, C, SHIFTED)
    return row, head, body, logits + on_octet(begin, head, SHIFTED), bits + row * words


@triton.jit
def marked_label(
    logits, words_row, classes, padding, logy, logy_rest, valid, row, head, C, row_stride, words, T, ignore,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr,
    GIVEN: tl.constexpr, TAIL: tl.constexpr, BUCKET: tl.constexpr, HARD: tl.constexpr,
):  # fmt: skip
    """Read a row's label (`read_label`) and set the bits of the places that it keeps.

    Gives whether the row counts, its kept classes, whether each is there, whether it repeats another, their logits and
    targets, the rest's target, and NaN where a class does not exist, else 0.
    """
    counts = row_counts(valid, classes, ignore, row, MASKED, HARD)
    ids, there, v, target, target_rest, poison = read_label(
        logits + row * row_stride, logits, classes, padding, logy, logy_rest, row, C, counts, T,
        K, KP, False, PADDED, True, GIVEN, TAIL, BUCKET, HARD,
    )  # fmt: skip
    repeated = mark_row(words_row, ids - head + OCTET, there, words, BLOCK // 8)
    return counts, ids, there, repeated, v, target, target_rest, poison


@triton.jit
def nothing_summed(BLOCK: tl.constexpr):
    """The octets and lanes of a block, and the maximum and the sum of every octet before it is read."""
    octets, lane = tl.arange(0, BLOCK // OCTET)[:, None] * OCTET, tl.arange(0, OCTET)[None, :]
    top = tl.full([BLOCK // OCTET], -float("inf"), tl.float32)
    return octets, lane, top, tl.zeros([BLOCK // OCTET], tl.float32)


@triton.jit
def places_at_edge(head, body, C):
    """The places of a row's edge, [2, 8], and which of them are classes."""
    at = tl.arange(0, 2)[:, None] * (body + OCTET) + tl.arange(0, OCTET)[None, :]
    of_class = at + head - OCTET
    return at, (of_class >= 0) & (of_class < C)


@triton.jit
def dirty(words_row, first, body, WHOLE: tl.constexpr):
    """Whether an octet of the body has a kept class; WHOLE: all that are asked for lie in it."""
    place = first + OCTET
    word = tl.load(words_row + place // 32) if WHOLE else tl.load(words_row + place // 32, mask=first < body, other=0)
    byte = ((word >> (place % 32)) & 255) + tl.zeros([1, OCTET], tl.int32)
    return tl.max(byte, axis=1) != 0


@triton.jit
def sum_up(z, left_out, top, total, by_tau, WIDE: tl.constexpr):
    """Take a block of octets into the maximum and the sum of exponentials of every place.

    WIDE logits are counted from the maximum before they are multiplied; those of 16 bits have no digits that a shared
    offset could take.
    """
    NOTHING = -float("inf")
    higher = tl.maximum(top, tl.where(left_out, NOTHING, tl.max(z, axis=1)))
    safe = tl.where(higher == NOTHING, 0.0, higher)
    if WIDE:
        part = tl.sum(tl.exp2((z - safe[:, None]) * by_tau), axis=1)
        total = total * tl.exp2((top - safe) * by_tau) + tl.where(left_out, 0.0, part)
    else:
        part = tl.sum(tl.exp2(z * by_tau - (safe * by_tau)[:, None]), axis=1)
        total = total * tl.exp2(top * by_tau - safe * by_tau) + tl.where(left_out, 0.0, part)
    return higher, total


@triton.jit
def whole_rest(z_body, words_row, ids, there, repeated, head, body, C, top, total, by_tau):
    """Bring a sweep's octets together with those that hold kept classes and with the edge.

    Gives the rest's largest logit, -inf where there is none, the sum of exponentials relative to it, 1 there, and the edge's
    logits, [2, 8], -inf where a class is kept or does not exist.
    """
    NOTHING = -float("inf")
    lane = tl.arange(0, OCTET)[None, :]
    place = ids - head + OCTET
    inner = there & (place >= OCTET) & (place < body + OCTET)
    # each octet is summed up by the lowest entry in it that repeats none
    byte = (tl.load(words_row + place // 32, mask=inner, other=0) >> (place // 8 * 8 % 32)) & 255
    mine = inner & (repeated == 0) & ((byte & ((1 << (place % 8)) - 1)) == 0)
    other = mine[:, None] & (((byte[:, None] >> lane) & 1) == 0)
    z = tl.load(z_body - OCTET + (place // 8 * 8)[:, None] + lane, mask=other, other=NOTHING).to(tl.float32)
    at, real = places_at_edge(head, body, C)
    kept = (tl.load(words_row + at // 32, mask=real, other=0) >> (at % 32)) & 1
    edge = tl.load(z_body - OCTET + at, mask=real & (kept == 0), other=NOTHING).to(tl.float32)
    best = tl.maximum(tl.maximum(tl.max(top, axis=0), tl.max(tl.max(z, axis=1), axis=0)), tl.max(tl.max(edge, axis=1)))
    safe = tl.where(best == NOTHING, 0.0, best)
    sums = tl.sum(total * tl.exp2((top - safe) * by_tau), axis=0)
    sums += tl.sum(tl.sum(tl.exp2((z - safe) * by_tau), axis=1), axis=0)
    sums += tl.sum(tl.sum(tl.exp2((edge - safe) * by_tau), axis=1), axis=0)
    return best, tl.where(best == NOTHING, 1.0, sums), edge


@triton.jit
def row_solved(
    v, best, sums, target, target_rest, ids, there, repeated, factor, counts, T, tau, mixture,
    K: tl.constexpr, ENTROPY: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A row's scaled loss, gradients of the kept logits, entries of one class each their sum, and the rest's slope."""
    NOTHING = -float("inf")
    largest = tl.maximum(tl.max(v, axis=0), best)
    largest = tl.where(largest == NOTHING, 0.0, largest)
    rest = tl.where(best == NOTHING, NOTHING, best - largest + tau * tl.log(sums))
    nothing = tl.zeros(v.shape, tl.float32)
    loss, g, g_rest = bucket_problem(
        v - largest, rest, target, target_rest, nothing, 1.0, T, mixture, ENTROPY, False, False, KIND
    )
    if tl.max(repeated, axis=0) > 0:
        g = together(g, ids, there, K)
    return (
        tl.where(counts, loss * factor, 0.0),
        tl.where(counts, g * factor, 0.0),
        tl.where(counts, g_rest * factor / sums, 0.0),
    )


@triton.jit
def slope_of(z, g_rest, best, by_tau, kind: tl.constexpr, WIDE: tl.constexpr):
    """Gradient of logits of the rest; 0 where the rest has none, whatever the logits are."""
    safe = tl.where(best == -float("inf"), 0.0, best)
    exponent = z.to(tl.float32) * by_tau - safe * by_tau
    if WIDE:
        exponent = (z.to(tl.float32) - safe) * by_tau
    return tl.where(g_rest == 0.0, 0.0, g_rest * tl.exp2(exponent)).to(kind)


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
