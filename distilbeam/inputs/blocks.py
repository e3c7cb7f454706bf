"""Blocks of tokens: what a row of a pool of text is, and which of its positions have a label.

A block is L tokens of one or several texts, one after another, each a *segment*. Label j describes the token
`input_ids[j + 1]` given the tokens of the same segment up to j. So no two segments see each other, the last token of a
segment predicts nothing, and where a completion mask says so the prompt's tokens are given and not predicted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

INPUT_IDS, SEGMENT_IDS, COMPLETION_MASK = "input_ids", "segment_ids", "completion_mask"
BLOCK_COLUMNS = (INPUT_IDS, SEGMENT_IDS, COMPLETION_MASK)
TOKENIZER_KEY = b"distilbeam.tokenizer"  # of a pool file's metadata: fingerprint, num_classes and chat_template as JSON
MAX_SEGMENTS = 2**15 - 1  # in a block; the column is int16
_TYPES = {INPUT_IDS: pa.int32(), SEGMENT_IDS: pa.int16(), COMPLETION_MASK: pa.uint8()}


def block_fields(length: int) -> list[pa.Field]:
    """Return the Arrow fields of a block.

    Args:
      length: tokens L of a block.

    Returns:
      `input_ids` int32 [L], `segment_ids` int16 [L] (0 is padding), `completion_mask` uint8 [L], lists of a fixed size.
    """
    return [
        pa.field(name, pa.list_(pa.field("element", kind, nullable=False), length), nullable=False)
        for name, kind in _TYPES.items()
    ]


def block_length(schema: pa.Schema, where: str) -> int:
    """Return the number of tokens L of the blocks in a pool.

    Args:
      schema: the pool's columns.
      where: the pool, for the message.

    Raises:
      ValueError: a column is missing, no list of a fixed size of its type, or of another length than the others.
    """
    lengths = {}
    for name, kind in _TYPES.items():
        found = schema.field(name).type if name in schema.names else None
        if found is None or not pa.types.is_fixed_size_list(found) or found.value_type != kind:
            raise ValueError(
                f"{where} must hold blocks of tokens: column {name} must be fixed_size_list<{kind}>, "
                f"{'there is none' if found is None else f'got {found}'}; 'distilbeam ingest --format lm' makes them"
            )
        lengths[name] = found.list_size
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        raise ValueError(f"{where} must hold blocks of one length, got {shown}")
    return int(lengths[INPUT_IDS])


def has_label(segment_ids: npt.NDArray[Any], completion_mask: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Tell which positions have a label.

    Args:
      segment_ids: integers [n, L], 0 for padding.
      completion_mask: integers [n, L], 1 for tokens that are to be predicted.

    Returns:
      bool [n, L]: position j, when token j + 1 is of the same segment and is to be predicted.
    """
    labelled = np.zeros(segment_ids.shape, bool)
    same = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    labelled[:, :-1] = same & (completion_mask[:, 1:] == 1)
    return labelled


def position_ids(segment_ids: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Count the tokens of each segment from 0.

    Args:
      segment_ids: integers [n, L]; padding counts as a segment.

    Returns:
      int64 [n, L].
    """
    places = np.broadcast_to(np.arange(segment_ids.shape[1], dtype=np.int64), segment_ids.shape)
    begins = np.ones(segment_ids.shape, bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first: npt.NDArray[np.int64] = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return places - first
