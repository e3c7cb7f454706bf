"""The texts of blocks: what a teacher that answers about one prompt at a time is asked, and where its answers go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.blocks import BLOCK_COLUMNS, INPUT_IDS, has_label
from distilbeam.inputs.config import InputError, require_columns
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels
from distilbeam.teacher.softlabels.columns import flat_values
from distilbeam.teacher.tokens.server_answers import Read


@dataclass(frozen=True)
class Text:
    """One text of a block.

    Attributes:
      start: its first position in the block.
      ids: its n tokens.
      there: bool [n - 1], which of them but the last have a label.
    """

    start: int
    ids: npt.NDArray[np.int32]
    there: npt.NDArray[np.bool_]

    def prompt(self, num_classes: int) -> list[int]:
        """Return its tokens.

        Raises:
          InputError: one is no id of the tokenizer.
        """
        if not 0 <= self.ids.min() <= self.ids.max() < num_classes:
            raise InputError(
                f"column {INPUT_IDS} must hold ids from 0 to {num_classes - 1:,}, got {int(self.ids.max()):,}"
            )
        prompt: list[int] = self.ids.tolist()
        return prompt


def texts_of(blocks: pa.RecordBatch, length: int) -> list[list[Text]]:
    """List the texts that have a label, block by block.

    Args:
      blocks: n blocks.
      length: tokens of a block.
    """
    require_columns(blocks, BLOCK_COLUMNS)
    ids, segments, mask = (flat_values(blocks.column(name), length) for name in BLOCK_COLUMNS)
    return [_texts(*row) for row in zip(ids, segments, has_label(segments, mask), strict=True)]


def _texts(ids: npt.NDArray[Any], segments: npt.NDArray[Any], there: npt.NDArray[np.bool_]) -> list[Text]:
    edges = [0, *(np.flatnonzero(np.diff(segments)) + 1).tolist(), len(segments)]
    return [
        Text(start, ids[start:stop], there[start : stop - 1])
        for start, stop in pairwise(edges)
        if there[start:stop].any()
    ]


def block_labels(texts: Sequence[Text], answers: Sequence[Read], spec: SoftLabelSpec) -> TokenLabels:
    """Make the labels of one block.

    Args:
      texts: those of it that have a label.
      answers: what the teacher says of all positions of each but the last.
      spec: of top-k labels.
    """
    labels = TokenLabels.empty(1, spec)
    assert labels.tail_logmass is not None
    for text, (classes, logprobs, tail, token_logprob) in zip(texts, answers, strict=True):
        at = np.flatnonzero(text.there)
        places = text.start + at
        labels.classes[0, places], labels.logprobs[0, places] = classes[at], logprobs[at]
        labels.tail_logmass[0, places], labels.token_logprob[0, places] = tail[at], token_logprob[at]
    return labels
