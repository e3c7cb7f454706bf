"""The files of a pool of blocks: some for each source, with ids that are hashes of what a block holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.inputs.blocks import BLOCK_COLUMNS, TOKENIZER_KEY, block_fields
from distilbeam.pipelines.corpus.packing import Block
from distilbeam.storage.atomic import replacing

_GROUP_BYTES = 2**24
_TOKEN_BYTES = 4 + 2 + 1
_ID_BYTES = 16


class BlockFiles:
    """Writes the blocks of one source into files that appear whole.

    Args:
      folder: the pool.
      stem: what the files' names begin with.
      length: tokens of a block.
      tokenizer: JSON that says which tokenizer made them, kept in each file.
      file_bytes: bytes of a file before compression, about.

    Attributes:
      names: of the files that are written.
      blocks: how many blocks they have.
    """

    def __init__(self, folder: Path, stem: str, length: int, tokenizer: str, file_bytes: int) -> None:
        self._folder, self._stem = folder, stem
        fields = [pa.field("example_id", pa.string(), nullable=False), *block_fields(length)]
        self._schema = pa.schema(fields, metadata={TOKENIZER_KEY: tokenizer})
        self._group = max(1, _GROUP_BYTES // (_TOKEN_BYTES * length))
        self._rows = max(1, file_bytes // (_TOKEN_BYTES * length))
        self.names: list[str] = []
        self.blocks = 0

    def write(self, blocks: Iterator[Block]) -> None:
        """Write all blocks, in their order."""
        waiting = next(blocks, None)
        while waiting is not None:
            name = f"{self._stem}-{len(self.names):05}.parquet"
            with ExitStack() as stack:
                target = stack.enter_context(replacing(self._folder / name))
                writer = stack.enter_context(pq.ParquetWriter(target, self._schema, **_parquet_options()))
                rows = 0
                while waiting is not None and rows < self._rows:
                    group: list[Block] = []
                    while waiting is not None and len(group) < min(self._group, self._rows - rows):
                        group.append(waiting)
                        waiting = next(blocks, None)
                    writer.write_table(self._table(group))
                    rows += len(group)
            self.names.append(name)
            self.blocks += rows

    def _table(self, blocks: Sequence[Block]) -> pa.Table:
        columns: list[pa.Array] = [pa.array([_content_id(block) for block in blocks], pa.string())]
        for name in BLOCK_COLUMNS:
            kind = self._schema.field(name).type
            values = np.concatenate([getattr(block, name) for block in blocks])
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values, kind.value_type), type=kind))
        return pa.table(columns, schema=self._schema)


def _content_id(block: Block) -> str:
    """Hash what a block holds: the same text has the same id wherever it comes from, and is asked about once."""
    content = hashlib.blake2b(digest_size=_ID_BYTES)
    for array, kind in ((block.input_ids, "<i4"), (block.segment_ids, "<i2"), (block.completion_mask, "u1")):
        content.update(array.astype(kind).tobytes())
    return content.hexdigest()


def _parquet_options() -> dict[str, object]:
    narrow = [f"{name}.list.element" for name in BLOCK_COLUMNS[1:]]
    return {
        "compression": "zstd",
        "use_dictionary": narrow,
        "column_encoding": {f"{BLOCK_COLUMNS[0]}.list.element": "BYTE_STREAM_SPLIT"},  # the high bytes of ids vanish
        "write_page_checksum": True,
        "store_schema": True,
    }
