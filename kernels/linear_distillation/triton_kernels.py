"""The last layer's logits, tile by tile, on the tensor cores: summed up or turned into gradients as they are made.

The weight, the bias and the bits of the kept classes are those of a part of the classes, counted from its first. A tile
of BM rows and BN classes is a sum of products over BH features at a time, in float32 or, of int8 rows, in int32, times the
scales of 8-bit rows. `rest_of_tiles` keeps of it a maximum and a sum of exponentials per row; `gradient_of_tile` makes it
again and stores its gradient, zero where a class is kept. `kept_logits` takes the dot products of each row with the few
weights that its label names.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(
    hidden, weight, row_scale, class_scale, bias, bits, rows, classes, B, C, H, words,
    BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
    BIAS: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Logits of a tile, -inf where a class is kept or does not exist; SCALED: 8-bit rows, WHOLE: of whole numbers."""
    total = tl.zeros([BM, BN], tl.int32 if WHOLE else tl.float32)
    row_in, class_in = rows < B, classes < C
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        x = tl.load(
            hidden + rows[:, None].to(tl.int64) * H + h[None, :], mask=row_in[:, None] & (h[None, :] < H), other=0.0
        )
        w = tl.load(
            weight + classes[None, :].to(tl.int64) * H + h[:, None],
            mask=class_in[None, :] & (h[:, None] < H),
            other=0.0,
        )
        if SCALED:  # Hopper's sums of fp8 within instructions are short: every BH products they are added up in full
            total = tl.dot(x, w, total, max_num_imprecise_acc=BH, out_dtype=tl.int32 if WHOLE else tl.float32)
        else:
            total = tl.dot(x, w, total, input_precision="ieee" if EXACT else "tf32")
    z = total.to(tl.float32)
    if SCALED:
        z *= tl.load(row_scale + rows, mask=row_in, other=0.0)[:, None]
        z *= tl.load(class_scale + classes, mask=class_in, other=0.0)[None, :]
    if BIAS:
        z += tl.load(bias + classes, mask=class_in, other=0.0).to(tl.float32)[None, :]
    word = tl.load(
        bits + rows[:, None].to(tl.int64) * words + classes[None, :] // 32,
        mask=row_in[:, None] & class_in[None, :],
        other=-1,
    )
    kept = (word >> (classes[None, :] % 32)) & 1
    return tl.where((kept == 0) & class_in[None, :], z, -float("inf"))


@triton.jit
def rest_of_tiles(
    hidden, weight, row_scale, class_scale, bias, bits, tops, totals, B, C, H, words, tau,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
    BIAS: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Largest logit and sum of exponentials of the classes that a row does not keep, over SPLIT tiles of classes."""
    NOTHING = -float("inf")
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    top, total = tl.full([BM], NOTHING, tl.float32), tl.zeros([BM], tl.float32)
    for number in range(SPLIT):
        classes = (tl.program_id(1) * SPLIT + number) * BN + tl.arange(0, BN)
        z = _tile(
            hidden, weight, row_scale, class_scale, bias, bits, rows, classes, B, C, H, words,
            BM, BN, BH, BIAS, SCALED, WHOLE, EXACT,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(z, axis=1))
        safe = tl.where(higher == NOTHING, 0.0, higher)
        total = total * tl.exp((top - safe) / tau) + tl.sum(tl.exp((z - safe[:, None]) / tau), axis=1)
        top = higher
    place = tl.program_id(1) * B + rows
    tl.store(tops + place, top, mask=rows < B)
    tl.store(totals + place, total, mask=rows < B)


@triton.jit
def gradient_of_tile(
    hidden, weight, row_scale, class_scale, bias, bits, rest, slope, gradient, B, C, H, words, stride, tau,
    BM: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
    BIAS: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Gradient slope * exp((z - rest) / tau) of all C classes of a part of the layer, stored in [B, stride]."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    classes = tl.program_id(1) * BN + tl.arange(0, BN)
    z = _tile(
        hidden, weight, row_scale, class_scale, bias, bits, rows, classes, B, C, H, words,
        BM, BN, BH, BIAS, SCALED, WHOLE, EXACT,
    )  # fmt: skip
    level = tl.load(rest + rows, mask=rows < B, other=float("inf"))
    factor = tl.load(slope + rows, mask=rows < B, other=0.0)
    value = tl.where(z == -float("inf"), 0.0, factor[:, None] * tl.exp((z - level[:, None]) / tau))
    there = (rows < B)[:, None] & (classes < C)[None, :]
    place = gradient + rows[:, None].to(tl.int64) * stride + classes[None, :]
    if ADD:
        value += tl.load(place, mask=there, other=0.0).to(tl.float32)
    tl.store(place, value.to(gradient.dtype.element_ty), mask=there)


@triton.jit
def kept_logits(
    hidden, weight, row_scale, class_scale, bias, classes, logits, H,
    K: tl.constexpr, KP: tl.constexpr, BH: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Logits of a row's kept classes."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    ids = tl.load(classes + row * K + k, mask=k < K, other=0).to(tl.int64)
    z = tl.zeros([KP], tl.float32)
    for start in range(0, H, BH):
        h = start + tl.arange(0, BH)
        x = tl.load(hidden + row * H + h, mask=h < H, other=0.0).to(tl.float32)
        w = tl.load(weight + ids[:, None] * H + h[None, :], mask=(k < K)[:, None] & (h < H)[None, :], other=0.0)
        z += tl.sum(w.to(tl.float32) * x[None, :], axis=1)
    if SCALED:
        z *= tl.load(row_scale + row) * tl.load(class_scale + ids, mask=k < K, other=0.0)
    if BIAS:
        z += tl.load(bias + ids, mask=k < K, other=0.0).to(tl.float32)
    tl.store(logits + row * K + k, z, mask=k < K)
