"""The loader of labels of tokens: blocks of a labelled corpus as batches of tensors, shuffled and resumable.

It is the loader of soft labels (`loader`), whose rows are blocks here, with its windows bounded in bytes: 65,536 blocks of
512 tokens would take 17 GB.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distilbeam.student.data.loader import SoftLabelDataset
from distilbeam.teacher.softlabels import SoftLabelSpec, read_manifest
from distilbeam.teacher.softlabels.spec import require_unit

BUFFER_BYTES = 2**28
_BLOCK_BYTES = 4 + 2 + 1  # of a token: its id, its segment, its mask


class TokenLabelDataset(SoftLabelDataset):
    """Batches of blocks with a teacher's labels of their tokens; see `SoftLabelDataset` for order, state and ranks.

    A batch maps names to tensors, for blocks of L tokens with P labels of k classes:

    * `input_ids` int32, `segment_ids` int16 (0 is padding), `completion_mask` uint8: [b, L];
    * `teacher_classes` int64, -1 where there is none, and `teacher_logprobs` float32: [b, P, k];
    * `teacher_tail_logmass` (top-k labels) and `teacher_token_logprob` float32: [b, P];
    * `label_positions` int32 [b, P], where P < L; else label j describes `input_ids[:, j + 1]`;
    * `row` int64 [b], the block's number in the datasets, and every scalar column of numbers that all shards have.

    A position has a label where `teacher_classes[..., 0] >= 0`; `distilbeam.inputs.blocks.has_label` says the same of the
    ids alone, and `position_ids` there counts the tokens of each segment.

    Args:
      path: directory of a dataset, or several of them with the same specification.
      batch_size: blocks per rank and step.
      seed: decides the order of the blocks, which does not depend on the ranks.
      rank: this process's number.
      world_size: number of processes that share the datasets.
      buffer_bytes: memory of the blocks that are held and shuffled together, as tensors; a block at least. It is part of the
        order, and at most four such windows are in memory.
      **options: `columns`, `mixing_weights`, `transform`, `workers`, `cache_bytes`, `pin_memory` of `SoftLabelDataset`.

    Raises:
      ValueError: the labels are of examples, or see `SoftLabelDataset`.

    Example:
      >>> blocks = TokenLabelDataset("job/labels", batch_size=8, seed=0)  # doctest: +SKIP
      >>> next(iter(blocks))["teacher_logprobs"].shape  # doctest: +SKIP
      torch.Size([8, 512, 32])
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        buffer_bytes: int = BUFFER_BYTES,
        **options: Any,
    ) -> None:
        if buffer_bytes < 1:
            raise ValueError(f"buffer_bytes must be at least 1, got {buffer_bytes}")
        first = path if isinstance(path, (str, Path)) else path[0]
        spec = read_manifest(first).spec
        require_unit(spec, "token", first)
        rows = max(1, buffer_bytes // tensor_bytes(spec))
        super().__init__(path, batch_size, seed, rank, world_size, buffer_rows=rows, unit="token", **options)


def tensor_bytes(spec: SoftLabelSpec) -> int:
    """Return the bytes that a block and its labels take as tensors.

    Args:
      spec: of labels of tokens.
    """
    per_label = 4 * (1 + (spec.kind == "top_k") + (spec.positions != "all"))
    return _BLOCK_BYTES * (spec.sequence_length or 0) + (4 + 8) * spec.width + per_label * spec.labels_per_row
