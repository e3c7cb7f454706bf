"""A row's lists of log-probabilities as top-k labels with a tail.

    tail = log(1 - sum of the k probabilities) = log(-expm1(log sum)), in float64

The k most probable classes are kept, ties in the order of the list. Where rounding made their sum more than 1 they are divided by it. The
log-probability of the token that is there is that of its class, among all that the row lists; NaN where it is none of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distilbeam.pipelines.conversion.alignment import Alignment, described
from distilbeam.pipelines.conversion.rows import PeerRow
from distilbeam.teacher.softlabels.codec import TAIL_FLOOR

_ROUNDING = 1e-2  # of a sum of probabilities that were stored in half precision or bfloat16
WHOLE = 1e-5  # what is left where log-probabilities were normalised over the classes that are kept


@dataclass(frozen=True)
class LabelledRow:
    """One text and its labels; label j describes token j + 1.

    Attributes:
      number: of its row, from 1.
      ids: int32 [T].
      completion_mask: uint8 [T], 1 for the tokens that have a label; of the first token, whether it was to be predicted.
      classes: int32 [T, k], -1 where there is none.
      logprobs: float32 [T, k].
      tail_logmass: float32 [T].
      token_logprob: float32 [T], NaN where it is not known.
      whole: labels that leave nothing for other classes.
    """

    number: int
    ids: npt.NDArray[np.int32]
    completion_mask: npt.NDArray[np.uint8]
    classes: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    tail_logmass: npt.NDArray[np.float32]
    token_logprob: npt.NDArray[np.float32]
    whole: int


def label_row(row: PeerRow, alignment: Alignment, k: int, num_classes: int) -> LabelledRow | None:
    """Make the labels of a row.

    Args:
      row: of another trainer.
      alignment: which token a list describes.
      k: classes of a label.
      num_classes: ids C of the tokenizer.

    Returns:
      The row without its padding; None where it has no label.

    Raises:
      ValueError: an id is beyond C, a list has fewer than k classes or one twice, or what it holds are no log-probabilities.
    """
    lists = described(row, alignment)
    tokens = np.flatnonzero(lists >= 0)
    if not len(tokens):
        return None
    seen = np.flatnonzero(row.seen)
    text = slice(int(seen[0]), int(seen[-1]) + 1)
    if not row.seen[text].all():
        raise ValueError(
            f"{row.where}: attention_mask must be 1 from the first to the last token of the text, it has gaps"
        )
    classes, logprobs = row.classes[lists[tokens]], row.logprobs[lists[tokens]]
    _check_ids(row, row.ids[text], classes, num_classes)
    if logprobs.max() > 1e-3:
        raise ValueError(
            f"{row.where}: log-probabilities must be at most 0, got {logprobs.max():.3g}: logits are no labels"
        )
    match = classes == row.ids[tokens, None]
    there = np.where(match, logprobs, -np.inf).max(axis=1)
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    kept, values = np.take_along_axis(classes, order, 1), np.take_along_axis(logprobs, order, 1)
    _check_kept(row, kept, k, tokens)
    total = np.exp(values).sum(axis=1)
    if total.max() > 1 + _ROUNDING:
        raise ValueError(
            f"{row.where}: the probabilities of a list must sum to at most 1, got {total.max():.3f}: they are no log-probabilities"
        )
    over = np.log(np.maximum(total, 1))
    values = np.minimum(values - over[:, None], 0)
    with np.errstate(divide="ignore"):
        tail = np.maximum(np.log(np.maximum(-np.expm1(np.log(total) - over), 0)), TAIL_FLOOR)
    length, positions = text.stop - text.start, tokens - 1 - text.start
    found = LabelledRow(
        row.number,
        row.ids[text].astype(np.int32),
        np.zeros(length, np.uint8),
        np.full((length, k), -1, np.int32),
        np.zeros((length, k), np.float32),
        np.zeros(length, np.float32),
        np.zeros(length, np.float32),
        int((total > 1 - WHOLE).sum()) if k < num_classes else 0,
    )
    found.completion_mask[0] = row.predicted[text.start]
    found.completion_mask[positions + 1] = 1
    found.classes[positions], found.logprobs[positions], found.tail_logmass[positions] = kept, values, tail
    found.token_logprob[positions] = np.where(match.any(axis=1), np.minimum(there, 0), np.nan)
    return found


def _check_ids(row: PeerRow, ids: npt.NDArray[np.int64], classes: npt.NDArray[np.int64], num_classes: int) -> None:
    largest, smallest = max(int(ids.max()), int(classes.max())), min(int(ids.min()), int(classes.min(initial=0)))
    if largest >= num_classes or smallest < -1 or ids.min() < 0:
        wrong = largest if largest >= num_classes else min(smallest, int(ids.min()))
        raise ValueError(
            f"{row.where}: ids must be below the {num_classes:,} of --tokenizer, got {wrong:,}; give the teacher's tokenizer"
        )


def _check_kept(row: PeerRow, kept: npt.NDArray[np.int64], k: int, tokens: npt.NDArray[np.int64]) -> None:
    counts = (kept >= 0).sum(axis=1)
    if counts.min() < k:
        raise ValueError(
            f"{row.where}: each list must have at least {k} classes, that of token {int(tokens[counts.argmin()]):,} has "
            f"{counts.min()}; --k {counts.min()} keeps as many of every list"
        )
    ordered = np.sort(kept, axis=1)
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    if len(twice):
        raise ValueError(
            f"{row.where}: the classes of a list must be distinct, that of token {int(tokens[twice[0, 0]]):,} has "
            f"{int(ordered[twice[0, 0], twice[0, 1]]):,} twice"
        )
