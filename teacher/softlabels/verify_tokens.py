"""The verification of labels of tokens: their distributions, and their teacher asked again in another order.

A teacher that is served and one that is loaded answer differently, and so may one whose batches are others. So the
sample is asked in reversed order, block by block, where the labels were made in batches, and once more in the same way: the
difference of these two answers is the control, what the teacher's own noise explains.

Stored probabilities are compared with the probabilities of the most probable classes now. A class that is not among those now
has at most the smallest of them. A frequency of draws may differ by what chance explains (Bernstein).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.blocks import BLOCK_COLUMNS, COMPLETION_MASK, SEGMENT_IDS, has_label
from distilbeam.teacher.predict import ask
from distilbeam.teacher.softlabels.columns import flat_values
from distilbeam.teacher.softlabels.comparison import UNLIKELY, Comparison
from distilbeam.teacher.softlabels.spec import SoftLabelSpec
from distilbeam.teacher.softlabels.token_labels import TokenLabels, decode_tokens

MOST_CLASSES = 64  # that are asked for now, or as many as are stored
SERVED_CLASSES = 20  # which vLLM allows as it is started
Float64 = npt.NDArray[np.float64]


def wrong_block(batch: pa.RecordBatch, spec: SoftLabelSpec) -> tuple[int, str] | None:
    """Find the first block whose labels cannot be.

    Args:
      batch: of a shard, with the blocks and their labels.
      spec: of the labels.

    Returns:
      Its row of the batch and what must be, as the end of a sentence; None where all are sound.
    """
    labels = decode_tokens(batch, spec)
    there = labels.labelled
    if spec.positions == "all":
        length = spec.sequence_length or 0
        segments, mask = (flat_values(batch.column(name), length) for name in (SEGMENT_IDS, COMPLETION_MASK))
        misplaced = (there != has_label(segments, mask)).any(axis=1)
        if misplaced.any():
            return int(misplaced.argmax()), "must have a label where its segments and its mask say so, and nowhere else"
    for row in range(len(there)):
        at = there[row]
        kept = labels.classes[row][at] >= 0
        logprobs = np.where(kept, labels.logprobs[row][at], -np.inf).astype(np.float64)
        probabilities = np.exp(logprobs)
        total = probabilities.sum(axis=1)
        if labels.tail_logmass is not None:
            total = total + np.exp(labels.tail_logmass[row][at].astype(np.float64))
        with np.errstate(invalid="ignore"):
            entropy = -np.where(probabilities > 0, probabilities * logprobs, 0).sum(axis=1)
        said = labels.token_logprob[row][at]
        sound = (logprobs <= 0).all() and not (said > 1e-6).any()  # NaN: converted labels may not say it
        if not (sound and (np.abs(total - 1) <= 2.0**-10 * entropy + 1e-5).all()):
            return row, "must have probabilities that sum to one at each position"
    return None


def wanted_form(spec: SoftLabelSpec, *, served: bool = False) -> dict[str, Any]:
    """Return the form in which a teacher is asked again, the fields of `TokenForm`.

    Args:
      spec: of the stored labels.
      served: whether a server is asked, which may allow no more classes than were stored.
    """
    stored = spec.k or 0
    if served:
        k = stored if spec.kind == "top_k" else min(stored, SERVED_CLASSES)
    else:
        k = max(MOST_CLASSES, stored) if spec.source == "logits" else stored
    return {
        "kind": "top_k",
        "k": min(spec.num_classes, k),
        "temperature": spec.temperature,
        "storage": "float32",
        "sequence_length": spec.sequence_length,
        "carried": BLOCK_COLUMNS,
    }


def compare_blocks(spec: SoftLabelSpec, rows: pa.Table, teacher: Any) -> Comparison:
    """Ask a teacher about labelled blocks again.

    Args:
      spec: of the stored labels.
      rows: blocks with their labels.
      teacher: of blocks, whose `spec` has the form of `wanted_form`.
    """
    again = rows.take(np.arange(rows.num_rows)[::-1])
    batch = again.combine_chunks().to_batches()[0]
    answers, control = (ask(teacher, batch, teacher.spec.answer_width, batch_size=1) for _ in range(2))
    same = teacher.fingerprint() == spec.teacher
    answered = np.flatnonzero(answers.ok & control.ok)
    failed = rows.num_rows - len(answered)
    if not len(answered):
        return Comparison(rows.num_rows, failed, math.nan, "none", same)
    now, then = (TokenLabels.unpack(found.logits[answered], teacher.spec) for found in (answers, control))
    stored = decode_tokens(again.take(answered), spec)
    differences = np.array([_difference(stored, now, row, spec) for row in range(len(answered))])
    worst = int(differences.argmax())
    noise = max(_difference(now, then, row, teacher.spec) for row in range(len(answered)))
    where = str(again["example_id"][int(answered[worst])].as_py())
    return Comparison(rows.num_rows, failed, float(differences[worst]), where, same, noise)


def other_tokenizer(spec: SoftLabelSpec, teacher: Any) -> Iterator[str]:
    """Say that a teacher's ids mean something else, where they do."""
    found: SoftLabelSpec = teacher.spec
    if (found.tokenizer, found.num_classes) != (spec.tokenizer, spec.num_classes):
        yield (
            f"the labels are of a tokenizer of {spec.num_classes:,} ids ({spec.tokenizer}), the teacher's has "
            f"{found.num_classes:,} ({found.tokenizer}): its answers were not compared"
        )


def _difference(stored: TokenLabels, now: TokenLabels, row: int, spec: SoftLabelSpec) -> float:
    """Return the largest difference of a probability in a block."""
    at = stored.labelled[row] & now.labelled[row]
    if (stored.labelled[row] != now.labelled[row]).any():
        return 1.0
    if not at.any():
        return 0.0
    tokens = np.abs(np.exp(stored.token_logprob[row][at]) - np.exp(now.token_logprob[row][at]))
    tokens = np.where(np.isnan(stored.token_logprob[row][at]), 0, tokens)  # converted labels may not say it
    kept = np.exp(now.logprobs[row][at].astype(np.float64))
    match = stored.classes[row][at][:, :, None] == now.classes[row][at][:, None, :]
    known = match.any(axis=2)
    expected: Float64 = np.where(known, (match * kept[:, None, :]).sum(axis=2), kept.min(axis=1)[:, None])
    there = stored.classes[row][at] >= 0
    difference = np.exp(np.where(there, stored.logprobs[row][at], -np.inf).astype(np.float64)) - expected
    difference = np.where(known, np.abs(difference), difference)
    if spec.kind == "sampled":
        draws = spec.k or 1
        chance = np.sqrt(2 * expected * (1 - expected) * UNLIKELY / draws) + UNLIKELY / (3 * draws)
        difference = difference - chance
    return float(max(tokens.max(), np.where(there, difference, 0).max(), 0))
