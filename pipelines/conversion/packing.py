"""Labelled rows become blocks of one length, each row a segment, and record batches of a shard.

A row is never cut, since its labels depend on all of its text: it goes into the fullest of some open blocks that has
room for it (best fit).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from distilbeam.inputs.blocks import BLOCK_COLUMNS, block_fields
from distilbeam.pipelines.conversion.labels import LabelledRow
from distilbeam.pipelines.corpus.packing import Block
from distilbeam.teacher.softlabels.spec import SoftLabelSpec
from distilbeam.teacher.softlabels.token_labels import TokenLabels, encode_tokens

_OPEN = 16  # blocks that rows may still go into
_BATCH_BYTES = 2**26


class LabelledBlock:
    """A block and the labels of its rows.

    Attributes:
      block: the tokens.
      rows: the labelled rows in it, in their order.
    """

    def __init__(self, length: int, fill: int) -> None:
        self.block = Block(length, fill)
        self.rows: list[LabelledRow] = []

    def add(self, row: LabelledRow) -> None:
        """Add a row that fits, as a segment."""
        self.block.add(row.ids, row.completion_mask, begins=True)
        self.rows.append(row)


def pack_rows(rows: Iterable[LabelledRow], length: int, fill: int) -> Iterator[LabelledBlock]:
    """Put rows into blocks.

    Args:
      rows: of at most `length` tokens.
      length: tokens of a block.
      fill: id of padding.
    """
    waiting: list[LabelledBlock] = []
    for row in rows:
        fitting = [one for one in waiting if one.block.room >= len(row.ids)]
        chosen = min(fitting, key=lambda one: one.block.room, default=None)
        if chosen is None:
            chosen = LabelledBlock(length, fill)
            waiting.append(chosen)
        chosen.add(row)
        fullest = min(waiting, key=lambda one: one.block.room)
        if len(waiting) > _OPEN or not fullest.block.room:
            waiting.remove(fullest)
            yield fullest
    yield from waiting


def encode_blocks(blocks: Iterable[LabelledBlock], spec: SoftLabelSpec, name: str) -> Iterator[pa.RecordBatch]:
    """Make record batches of a shard, some blocks at a time.

    Args:
      blocks: from `pack_rows`.
      spec: of top-k labels.
      name: of the source; ids are it and the number of a block's first row.
    """
    together, group = max(1, _BATCH_BYTES // spec.label_bytes), []
    for block in blocks:
        group.append(block)
        if len(group) == together:
            yield _batch(group, spec, name)
            group = []
    if group:
        yield _batch(group, spec, name)


def _batch(group: Sequence[LabelledBlock], spec: SoftLabelSpec, name: str) -> pa.RecordBatch:
    labels = TokenLabels.empty(len(group), spec)
    assert labels.tail_logmass is not None
    for number, block in enumerate(group):
        start = 0
        for row in block.rows:
            here = slice(start, start := start + len(row.ids))
            labels.classes[number, here], labels.logprobs[number, here] = row.classes, row.logprobs
            labels.tail_logmass[number, here] = row.tail_logmass
            labels.token_logprob[number, here] = row.token_logprob
    encoded = encode_tokens(labels, spec)
    columns: list[pa.Array] = [pa.array([f"{name}:{block.rows[0].number}" for block in group], pa.string())]
    fields = block_fields(spec.sequence_length or 0)
    for field, column in zip(fields, BLOCK_COLUMNS, strict=True):
        values = np.concatenate([getattr(block.block, column) for block in group])
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values, field.type.value_type), type=field.type))
    schema = pa.schema([pa.field("example_id", pa.string(), nullable=False), *fields, *encoded.schema])
    return pa.RecordBatch.from_arrays([*columns, *encoded.columns], schema=schema)
