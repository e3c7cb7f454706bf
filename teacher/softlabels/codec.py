"""The codec of soft labels: logits to dense, top-k or sampled log-probabilities, and back.

    logprob_c = x_c / T - log sum_j exp(x_j / T),   stored rounded to half precision
    tail      = log sum over the classes not kept of exp(logprob_c)
    sampled   = log(count_c / k) of k independent draws, exact in float32, restored exactly from float16

Accuracy. The softmax runs in float32 after the largest logit is subtracted exactly: its log-probabilities z have an
error of at most 2^-23 (|z| + log2 C + 4). Rounding to half precision adds at most 2^-11 |z| (2^-25 where |z| < 2^-14),
so that the stored probabilities of a row sum to one within 2^-11 times the teacher's entropy in nats, at most 0.6 % for
300,000 classes. Finite log-probabilities below -65,504 are stored as -65,504.

Cost. Rows are worked on in blocks that stay in the processor's cache. The k largest of C classes are found by comparing
with a bound taken from block maxima, which reads the logits twice and sorts only about k of them.

References: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531; Anshumann et al., Sparse Logit
Sampling: Accelerating Knowledge Distillation in LLMs, arXiv:2503.16870 (sampled labels).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from distilbeam.teacher.softlabels.columns import (
    CLASSES,
    LOGPROBS,
    TAIL,
    check_columns,
    flat_values,
    label_schema,
)
from distilbeam.teacher.softlabels.selecting import Randomness, RowRandomness, draw_classes, largest
from distilbeam.teacher.softlabels.spec import SoftLabelSpec, require_unit

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

_BLOCK_VALUES = 2**18
_BLOCK_ROWS = 4096
_FEW = 32  # classes
_HALF_LOWEST = np.float32(-65504.0)
_SEARCH_BLOCK = 2**12  # numbers looked at together
_HALF_SHIFT = 13  # mantissa bits that a float32 has and a float16 has not
# log(1 - sum of the kept) computed in float32 has no more digits than this, and a finite tail keeps losses finite.
TAIL_FLOOR = np.float32(math.log(1e-7))


@dataclass(frozen=True)
class SoftLabels:
    """Decoded soft labels of n rows.

    Attributes:
      logprobs: float32 [n, k] (dense: [n, C]); -inf where a sampled label has fewer than k distinct classes.
      classes: int32 [n, k], -1 where there is no class; None for dense labels.
      tail_logmass: float32 [n], log of the mass that top-k labels left out; None for other kinds.
    """

    logprobs: Float32
    classes: Int32 | None = None
    tail_logmass: Float32 | None = None

    def dense(self, num_classes: int) -> Float32:
        """Spread sparse labels over all classes.

        Args:
          num_classes: number of classes C.

        Returns:
          float32 [n, C] log-probabilities. Classes that a top-k label left out share its tail equally; classes that a
          sampled label never drew are -inf.
        """
        if self.classes is None:
            return self.logprobs
        rest = np.full(len(self.logprobs), -np.inf, np.float32)
        if self.tail_logmass is not None and num_classes > self.logprobs.shape[1]:
            rest = self.tail_logmass - np.float32(math.log(num_classes - self.logprobs.shape[1]))
        full = np.repeat(rest[:, None], num_classes, axis=1)
        row, slot = np.nonzero(self.classes >= 0)
        full[row, self.classes[row, slot]] = self.logprobs[row, slot]
        return full


def encode(
    logits: Any,
    spec: SoftLabelSpec,
    *,
    rng: Randomness | None = None,
    seeds: npt.NDArray[np.uint64] | None = None,
) -> pa.RecordBatch:
    """Encode a teacher's answers as soft labels.

    Args:
      logits: floating [n, C], a NumPy array (float16, bfloat16, float32 or float64) or a torch tensor. -inf marks a
        class that a row cannot have.
      spec: the form of the labels: kind, k, temperature, storage.
      rng: generator of the draws of sampled labels, from which the rows draw one after the other.
      seeds: uint64 [n], of each row's draws, which then depend on nothing else. Without generator and seeds the hashes of
        the rows' logits are the seeds, so that the same answer always gives the same label.

    Returns:
      A record batch of n rows with the columns of `label_schema(spec)`. Kept classes descend in probability, ties by
      class; drawn classes ascend. `teacher_margin` is the difference of the two largest probabilities.

    Raises:
      ValueError: another shape than [n, C], a row with NaN, +inf or nothing but -inf, or labels of tokens.

    Example:
      >>> spec = SoftLabelSpec(num_classes=3, kind="top_k", k=2)
      >>> encode(np.array([[2.0, 0.0, 1.0]]), spec)["teacher_classes"].to_pylist()
      [[0, 2]]
    """
    require_unit(spec, "example", "the specification")
    answers = _array(logits, spec.num_classes)
    out = _Columns(spec, len(answers))
    if spec.kind == "sampled" and rng is None and seeds is None:
        seeds = _seeds(answers)
    if rng is None and seeds is not None:
        rng = RowRandomness(seeds)
    for rows in _blocks(answers.shape):
        out.fill(rows, _shifted(answers, rows, spec.temperature), rng)
    return out.batch()


def decode(labels: pa.RecordBatch | pa.Table, spec: SoftLabelSpec) -> SoftLabels:
    """Decode soft labels; without a copy where storage and chunks allow.

    Args:
      labels: a batch or table with the columns of the distribution; others, `teacher_margin` too, are not needed.
      spec: the specification that the labels were written with.

    Returns:
      The labels as arrays.

    Raises:
      ValueError: a column is missing, of another type, or has missing values, or the labels are of tokens.
    """
    require_unit(spec, "example", "the dataset")
    check_columns(labels.schema, spec, margin=False)
    if spec.kind == "sampled":
        classes = flat_values(labels.column(CLASSES), spec.width)
        return SoftLabels(frequencies(labels.column(LOGPROBS), spec.width, spec.width), classes)
    stored = flat_values(labels.column(LOGPROBS), spec.width).astype(np.float32, copy=False)
    if spec.kind == "dense":
        return SoftLabels(stored)
    classes = flat_values(labels.column(CLASSES), spec.width)
    tail = labels.column(TAIL)
    return SoftLabels(stored, classes, tail.to_numpy(zero_copy_only=False) if len(tail) else np.empty(0, np.float32))


def round_to_half(values: Float32) -> npt.NDArray[np.float16]:
    """Round log-probabilities to half precision.

    Args:
      values: float32, at most 0.

    Returns:
      float16, nearest, ties to even; finite values stay finite.
    """
    if values.size and values.min() < _HALF_LOWEST:
        values = np.where(values < _HALF_LOWEST, np.where(np.isinf(values), values, _HALF_LOWEST), values)
    half: npt.NDArray[np.float16] = values.astype(np.float16)
    return half


def _seeds(answers: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    hashes = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in answers)
    return np.frombuffer(b"".join(hashes), "<u8").astype(np.uint64, copy=False)


class _Columns:
    """The columns of a batch, filled block by block."""

    def __init__(self, spec: SoftLabelSpec, rows: int) -> None:
        self.spec = spec
        self.logprobs = np.empty((rows, spec.width), np.float32 if spec.storage == "float32" else np.float16)
        self.classes = np.empty((rows, spec.width), np.int32) if spec.kind != "dense" else None
        self.tail = np.empty(rows, np.float32)
        self.margin = np.empty(rows, np.float32)

    def fill(self, rows: slice, shifted: Float32, rng: Randomness | None) -> None:
        """Encode a block of logits whose largest is 0."""
        mass = np.exp(shifted)
        total = _row_sums(mass)
        if self.classes is None:
            kept = shifted - np.log(total)
        elif self.spec.kind == "top_k":
            classes = largest(shifted, self.spec.width)
            kept = np.take_along_axis(shifted, classes, axis=1) - np.log(total)
            self.classes[rows] = classes
        else:
            assert rng is not None
            self.classes[rows], counts = draw_classes(mass, self.spec.width, rng)
            with np.errstate(divide="ignore"):
                kept = np.log(counts / np.float32(self.spec.width))
        exact = self.spec.kind == "sampled" and self.spec.storage == "float32"
        self.logprobs[rows] = kept if exact else round_to_half(kept)
        self.margin[rows] = (1 - _second_largest(mass)) / total[:, 0]  # the largest mass is exp(0)
        if self.spec.kind == "top_k":
            np.put_along_axis(mass, classes, 0, axis=1)
            self.tail[rows] = _log_tail(mass.sum(axis=1) / total[:, 0])

    def batch(self) -> pa.RecordBatch:
        schema = label_schema(self.spec)
        columns = [_lists(self.logprobs, schema.field(LOGPROBS).type)]
        if self.classes is not None:
            columns.append(_lists(self.classes, schema.field(CLASSES).type))
        if self.spec.kind == "top_k":
            columns.append(pa.array(self.tail))
        columns.append(pa.array(self.margin))
        return pa.RecordBatch.from_arrays(columns, schema=schema)


def _array(logits: Any, num_classes: int) -> npt.NDArray[Any]:
    if hasattr(logits, "detach"):  # a torch tensor; NumPy has no bfloat16 to view it as
        logits = logits.detach().float().cpu().numpy()
    array = np.asarray(logits)
    if array.ndim != 2 or array.shape[1] != num_classes:
        raise ValueError(f"logits must have shape [rows, {num_classes:,}], got {list(array.shape)}")
    if array.dtype.kind in "iu":
        array = array.astype(np.float64)
    if array.dtype.kind not in "fV" and array.dtype.name != "bfloat16":
        raise ValueError(f"logits must be floating, got {array.dtype}")
    return array


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    step = min(_BLOCK_ROWS, max(1, _BLOCK_VALUES // shape[1]))
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _shifted(logits: npt.NDArray[Any], rows: slice, temperature: float) -> Float32:
    """Subtract each row's largest logit in the precision it came in, then divide by the temperature."""
    block = logits[rows]
    if block.dtype.itemsize < 4:
        block = block.astype(np.float32)
    if block.shape[1] <= _FEW:
        block = np.asfortranarray(block)  # a class at a time: NumPy's sums along short rows take three times as long
    largest_logit = block.max(axis=1, keepdims=True)
    finite = np.isfinite(largest_logit)
    if not finite.all():
        row = rows.start + int(np.flatnonzero(~finite)[0])
        raise ValueError(f"logits must be finite (-inf for a class that a row cannot have), row {row:,} is not")
    shifted = block - largest_logit
    if temperature != 1:
        shifted /= shifted.dtype.type(temperature)
    shifted_float32: Float32 = shifted.astype(np.float32, copy=False)
    return shifted_float32


def _log_tail(tail: Float32) -> Float32:
    with np.errstate(divide="ignore"):
        logs: Float32 = np.maximum(np.log(tail), TAIL_FLOOR)
    return logs


def _row_sums(mass: Float32) -> Float32:
    """Sum each row, [n, 1], in pairs: NumPy does along contiguous rows, but not from column to column."""
    while 2 < mass.shape[1] <= _FEW:
        half = mass.shape[1] // 2
        paired = mass[:, :half] + mass[:, half : 2 * half]
        if mass.shape[1] % 2:
            paired[:, 0] += mass[:, -1]
        mass = paired
    total: Float32 = mass.sum(axis=1, keepdims=True)
    return total


def _second_largest(mass: Float32) -> Float32:
    """Return the second largest of each row; the largest is lowered for a moment, which is faster than a partition."""
    if 1 < mass.shape[1] <= _FEW:
        return _second_of_few(mass)
    rows, best = np.arange(len(mass)), mass.argmax(axis=1)
    largest_mass = mass[rows, best]
    mass[rows, best] = 0
    second: Float32 = mass.max(axis=1)
    mass[rows, best] = largest_mass
    return second


def _second_of_few(mass: Float32) -> Float32:
    """Return the second largest of each row, from columns that are contiguous."""
    best, second = mass[:, 0].copy(), np.zeros(len(mass), np.float32)
    for column in mass.T[1:]:
        np.maximum(second, np.minimum(best, column), out=second)
        np.maximum(best, column, out=best)
    return second


def frequencies(column: pa.Array | pa.ChunkedArray, width: int, draws: int) -> Float32:
    """Read the frequencies of sampled labels, piece by piece of their column.

    Args:
      column: lists of log(count / draws), rounded to half precision or not.
      width: values of a list.
      draws: draws of each label.

    Returns:
      float32 [n, width], exact.
    """
    pieces = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    restored = [_restored(flat_values(piece, width), draws) for piece in pieces]
    if len(restored) == 1:
        return restored[0]
    return np.concatenate(restored) if restored else np.empty((0, width), np.float32)


def _restored(stored: npt.NDArray[Any], draws: int) -> Float32:
    """Give what is exact as it is; float32 labels written by the first versions were rounded to half precision too."""
    if stored.dtype == np.float32 and _has_low_bits(stored):
        return stored
    # A place is inside the table whatever was stored, so that none need be checked. Arrow takes at twice NumPy's speed.
    places = pa.array(_places(stored).reshape(-1))
    taken = pc.take(_restoring(draws, stored.dtype.char), places, boundscheck=False)
    frequencies: Float32 = taken.to_numpy().reshape(stored.shape)
    return frequencies


def _has_low_bits(stored: Float32) -> bool:
    """Say whether any value has more digits than half precision; of exact labels nearly every one has."""
    bits = stored.view(np.uint32).reshape(-1)
    pieces = (bits[start : start + _SEARCH_BLOCK] for start in range(0, len(bits), _SEARCH_BLOCK))
    return any(np.bitwise_and(piece, np.uint32(2**_HALF_SHIFT - 1)).any() for piece in pieces)


def _places(stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Give the bits of a float16, or the 19 upper ones of a float32 that holds a value of half precision."""
    if stored.dtype == np.float16:
        return stored.view(np.uint16)
    return np.right_shift(stored.view(np.uint32), np.uint32(_HALF_SHIFT)).view(np.int32)


@lru_cache(maxsize=4)
def _restoring(draws: int, storage: str) -> pa.Array:
    """Map the place of a stored value to the frequency that it stands for, NaN where to none.

    Rounding keeps the logarithms of up to MAX_DRAWS counts apart, so that the map is exact.
    """
    with np.errstate(divide="ignore"):
        exact = np.log(np.arange(draws + 1, dtype=np.float32) / np.float32(draws))
    table = np.full(2**16 if storage == "e" else 2 ** (32 - _HALF_SHIFT), np.nan, np.float32)
    table[_places(round_to_half(exact).astype(storage))] = exact
    return pa.array(table)


def _lists(values: npt.NDArray[Any], type_: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=type_)
