"""Tokens of documents become blocks of one length, each document a segment.

Text flows: a block is filled to its last token, and the rest of a document begins the next one, as a segment of its own.
A conversation is never cut, since its question would be gone: it goes into the fullest of some open blocks that has
room for it (best fit).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from distilbeam.inputs.blocks import MAX_SEGMENTS
from distilbeam.pipelines.corpus.documents import BadRecord
from distilbeam.pipelines.corpus.tokenising import Tokens

_OPEN = 64  # blocks that conversations may still go into


class Block:
    """L tokens that are filled from the left.

    Attributes:
      input_ids: int32 [L], `fill` where nothing is.
      segment_ids: int16 [L], 0 where nothing is.
      completion_mask: uint8 [L], 0 where nothing is.
      size: tokens that are there.
    """

    def __init__(self, length: int, fill: int) -> None:
        self.input_ids: npt.NDArray[np.int32] = np.full(length, fill, np.int32)
        self.segment_ids: npt.NDArray[np.int16] = np.zeros(length, np.int16)
        self.completion_mask: npt.NDArray[np.uint8] = np.zeros(length, np.uint8)
        self.size = self._segments = 0

    @property
    def room(self) -> int:
        """Tokens that fit."""
        return len(self.input_ids) - self.size if self._segments < MAX_SEGMENTS else 0

    def add(self, ids: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8], *, begins: bool) -> None:
        """Add tokens, as a new segment or to the last one."""
        self._segments += int(begins or not self._segments)
        here = slice(self.size, self.size + len(ids))
        self.input_ids[here], self.segment_ids[here], self.completion_mask[here] = ids, self._segments, mask
        self.size += len(ids)


def pack_text(tokens: Iterable[Tokens | BadRecord], length: int, fill: int) -> Iterator[Block | BadRecord]:
    """Fill block after block.

    Args:
      tokens: of documents and their pieces.
      length: tokens of a block.
      fill: id of padding, in the last block.
    """
    block = Block(length, fill)
    for found in tokens:
        if isinstance(found, BadRecord):
            yield found
            continue
        start, begins = 0, found.begins
        while start < len(found.ids):
            if not block.room:
                yield block
                block = Block(length, fill)
            stop = start + block.room
            block.add(found.ids[start:stop], found.mask[start:stop], begins=begins)
            start, begins = stop, False
    if block.size:
        yield block


def pack_whole(tokens: Iterable[Tokens | BadRecord], length: int, fill: int) -> Iterator[Block | BadRecord]:
    """Put each document whole into the fullest open block that has room for it.

    Args:
      tokens: of documents.
      length: tokens of a block; a longer document is a bad record.
      fill: id of padding.
    """
    blocks: list[Block] = []
    for found in tokens:
        if isinstance(found, BadRecord):
            yield found
            continue
        size = len(found.ids)
        if size > length:
            yield BadRecord(found.record, f"it has {size:,} tokens, a block has {length:,}; raise --sequence-length")
            continue
        fitting = [block for block in blocks if block.room >= size]
        block = min(fitting, key=lambda block: block.room, default=None)
        if block is None:
            block = Block(length, fill)
            blocks.append(block)
        block.add(found.ids, found.mask, begins=True)
        if not block.room:
            blocks.remove(block)
            yield block
        elif len(blocks) > _OPEN:
            fullest = min(blocks, key=lambda block: block.room)
            blocks.remove(fullest)
            yield fullest
    yield from blocks
