"""Soft labels of tokens: a teacher's answers to a block, as arrays, as a row of numbers, and as columns.

A block has P labels of k classes. A position without a label has the class -1 and log-probabilities of 0; so has a slot
that a sampled label with fewer than k distinct classes leaves free, with a log-probability of -inf. Between teacher and
shard an answer is one row of float32 (`pack`), so that whatever asks, halves, retries and keeps answers to rows does so
with blocks, too: a NaN in it is a block without a label.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.teacher.softlabels.codec import frequencies, round_to_half
from distilbeam.teacher.softlabels.columns import (
    CLASSES,
    LOGPROBS,
    POSITIONS,
    TAIL,
    TOKEN_LOGPROB,
    check_columns,
    flat_values,
    label_schema,
)
from distilbeam.teacher.softlabels.spec import SoftLabelSpec, require_unit

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TokenLabels:
    """Labels of n blocks with P positions each.

    Attributes:
      classes: int32 [n, P, k], -1 where there is none.
      logprobs: float32 [n, P, k], log-probabilities, of sampled labels log frequencies.
      tail_logmass: float32 [n, P], log of the mass that top-k labels left out; None for sampled ones.
      token_logprob: float32 [n, P], log-probability of the token that stands at the next position; NaN where what the
        labels were converted from does not say it.
      positions: int32 [n, P], the positions that are labelled, where they are not all.
    """

    classes: npt.NDArray[np.int32]
    logprobs: Float32
    tail_logmass: Float32 | None
    token_logprob: Float32
    positions: npt.NDArray[np.int32] | None = None

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        """Which positions have a label, bool [n, P]."""
        there: npt.NDArray[np.bool_] = self.classes[:, :, 0] >= 0
        return there

    @classmethod
    def empty(cls, blocks: int, spec: SoftLabelSpec) -> TokenLabels:
        """Return blocks of which no position has a label, to be filled."""
        shape = (blocks, spec.labels_per_row)
        kept = (*shape, spec.k or 0)
        tail = np.zeros(shape, np.float32) if spec.kind == "top_k" else None
        return cls(np.full(kept, -1, np.int32), np.zeros(kept, np.float32), tail, np.zeros(shape, np.float32))

    def pack(self) -> Float32:
        """Return each block's answer as a row, float32 [n, `spec.answer_width`]; classes are whole numbers below 2^24."""
        tail = np.zeros_like(self.token_logprob) if self.tail_logmass is None else self.tail_logmass
        parts = (self.classes, self.logprobs, tail, self.token_logprob)
        rows = len(self.classes)
        return np.concatenate([np.asarray(part, np.float32).reshape(rows, -1) for part in parts], axis=1)

    @classmethod
    def unpack(cls, rows: Float32, spec: SoftLabelSpec) -> TokenLabels:
        """Read what `pack` returned for labels of a specification; views of the rows but for the classes."""
        kept, labels, shape = spec.width, spec.labels_per_row, (len(rows), spec.labels_per_row, spec.k or 0)
        classes = rows[:, :kept].astype(np.int32).reshape(shape)
        logprobs = rows[:, kept : 2 * kept].reshape(shape)
        tail = rows[:, 2 * kept : 2 * kept + labels] if spec.kind == "top_k" else None
        return cls(classes, logprobs, tail, rows[:, 2 * kept + labels :])


def encode_tokens(labels: TokenLabels, spec: SoftLabelSpec) -> pa.RecordBatch:
    """Make the columns of labels of tokens.

    Args:
      labels: of n blocks; log-probabilities of top-k labels are rounded to half precision here.
      spec: the form of the labels.

    Returns:
      A record batch of n rows with the columns of `label_schema(spec)`.

    Raises:
      ValueError: the specification is of examples, or the labels have other shapes than it says.
    """
    require_unit(spec, "token", "the specification")
    rows = len(labels.classes)
    expected = (rows, spec.labels_per_row, spec.k)
    if labels.classes.shape != expected or labels.logprobs.shape != expected:
        raise ValueError(
            f"labels of tokens must have the shape {list(expected)}, got {list(labels.classes.shape)} classes and "
            f"{list(labels.logprobs.shape)} log-probabilities"
        )
    exact = spec.kind == "sampled" and spec.storage == "float32"
    kept = labels.logprobs if exact else round_to_half(labels.logprobs)
    values = {
        LOGPROBS: kept.astype(np.float32 if spec.storage == "float32" else np.float16, copy=False),
        CLASSES: labels.classes,
        TAIL: labels.tail_logmass,
        TOKEN_LOGPROB: labels.token_logprob,
        POSITIONS: labels.positions,
    }
    schema = label_schema(spec)
    columns = []
    for field in schema:
        array = values[field.name]
        if array is None:
            raise ValueError(f"{field.name} must be given for {spec.kind} labels of positions '{spec.positions}'")
        flat = pa.array(np.ascontiguousarray(array).reshape(-1), field.type.value_type)
        columns.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def decode_tokens(labels: pa.RecordBatch | pa.Table, spec: SoftLabelSpec) -> TokenLabels:
    """Decode labels of tokens; without a copy where storage and chunks allow.

    Args:
      labels: a batch or table with the label columns; others are not needed.
      spec: the specification that the labels were written with.

    Returns:
      The labels as arrays.

    Raises:
      ValueError: the labels are of examples, a column is missing, of another type, or has missing values.
    """
    require_unit(spec, "token", "the dataset")
    check_columns(labels.schema, spec)
    count = spec.labels_per_row
    shape = (labels.num_rows, count, spec.k or 0)
    classes = flat_values(labels.column(CLASSES), spec.width).reshape(shape)
    if spec.kind == "sampled":
        logprobs = frequencies(labels.column(LOGPROBS), spec.width, spec.k or 0)
    else:
        logprobs = flat_values(labels.column(LOGPROBS), spec.width).astype(np.float32, copy=False)
    return TokenLabels(
        classes,
        logprobs.reshape(shape),
        flat_values(labels.column(TAIL), count) if spec.kind == "top_k" else None,
        flat_values(labels.column(TOKEN_LOGPROB), count),
        flat_values(labels.column(POSITIONS), count) if spec.positions != "all" else None,
    )
