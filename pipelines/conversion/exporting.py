"""Top-k token labels become rows for axolotl's distillation: Parquet files with a row for each segment.

`target_logprobs`, `target_token_ids` and `target_mask` are lists of T lists of k. A position without a label has a mask of 0 and
axolotl's own padding. axolotl knows no tail: the mass of the other classes is not in its form.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.inputs.blocks import BLOCK_COLUMNS
from distilbeam.pipelines.conversion.alignment import Alignment
from distilbeam.pipelines.conversion.rows import IGNORED
from distilbeam.pipelines.engine.display import Display
from distilbeam.storage.atomic import committed_directory
from distilbeam.teacher.softlabels import SoftLabelSpec, read_manifest
from distilbeam.teacher.softlabels.columns import CLASSES, LOGPROBS, TAIL, TOKEN_LOGPROB, flat_values
from distilbeam.teacher.softlabels.inspect import opened_shard
from distilbeam.teacher.softlabels.spec import require_unit
from distilbeam.teacher.softlabels.token_labels import decode_tokens

PADDING = -1e9
_BATCH_BYTES = 2**26
_NUMBERS, _LISTS = pa.list_(pa.int64()), pa.list_(pa.list_(pa.int64()))
SCHEMA = pa.schema(
    {
        "input_ids": _NUMBERS,
        "attention_mask": _NUMBERS,
        "labels": _NUMBERS,
        "target_token_ids": _LISTS,
        "target_logprobs": pa.list_(pa.list_(pa.float32())),
        "target_mask": _LISTS,
    }
)


def write_axolotl(
    labels: str | Path, out: Path, alignment: Alignment = "next", display: Display | None = None
) -> tuple[int, int]:
    """Write token labels in axolotl's form.

    Args:
      labels: a dataset of top-k labels of tokens.
      out: folder of Parquet files, one for each shard; appears whole.
      alignment: whether list j describes token j + 1 (`next`, what axolotl reads now) or token j (`own`, as it did formerly).
      display: where to show progress; nothing is shown without one.

    Returns:
      The numbers of rows and of labels.

    Raises:
      ValueError: `out` is there, or the labels are of examples, drawn, or of some positions alone.
    """
    manifest, display = read_manifest(labels), display or Display.silent()
    spec = manifest.spec
    require_unit(spec, "token", labels)
    if spec.kind != "top_k" or spec.positions != "all":
        raise ValueError(
            f"axolotl takes the k most probable tokens at all positions, {labels} holds labels of kind {spec.kind} at positions "
            f"{spec.positions}; label with labels.kind = 'top_k'"
        )
    if out.exists():
        raise ValueError(f"--out: {out} is there already; name another directory or remove it")
    rows = count = 0
    with display.step(f"convert {len(manifest.entries):,} shard(s)") as progress, committed_directory(out) as folder:
        for number, (entry, path) in enumerate(zip(manifest.entries, manifest.paths(), strict=True)):
            progress.step(number, len(manifest.entries), path.name)
            with pq.ParquetWriter(folder / path.name, SCHEMA, compression="zstd") as writer:
                for table, labelled in _tables(path, entry.spec, alignment):
                    writer.write_table(table)
                    rows, count = rows + table.num_rows, count + labelled
    return rows, count


def _tables(path: Path, spec: SoftLabelSpec, alignment: Alignment) -> Iterator[tuple[pa.Table, int]]:
    names = [*BLOCK_COLUMNS, LOGPROBS, CLASSES, TAIL, TOKEN_LOGPROB]
    with opened_shard(path) as file:
        for batch in file.iter_batches(max(1, _BATCH_BYTES // spec.label_bytes), columns=names):
            yield _table(batch, spec, alignment)


def _table(batch: pa.RecordBatch, spec: SoftLabelSpec, alignment: Alignment) -> tuple[pa.Table, int]:
    length, k = spec.sequence_length or 0, spec.k or 0
    ids, segments, mask = (flat_values(batch.column(name), length) for name in BLOCK_COLUMNS)
    labels = decode_tokens(batch, spec)
    classes, logprobs = labels.classes, labels.logprobs
    if alignment == "own":  # label j describes token j + 1; the last one of a block is none
        classes, logprobs = np.roll(classes, 1, axis=1), np.roll(logprobs, 1, axis=1)
    there = segments != 0
    tokens = ids[there].astype(np.int64)
    kept, values = classes[there].astype(np.int64), logprobs[there]
    full = kept >= 0
    empty = ~full.any(axis=1)
    kept[empty] = np.arange(k)
    blocks = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)[there]
    begins = np.flatnonzero(np.r_[True, (np.diff(blocks) != 0) | (np.diff(segments[there]) != 0)])
    columns = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "labels": np.where(mask[there] == 1, tokens, IGNORED),
        "target_token_ids": kept,
        "target_logprobs": np.where(full, values, np.float32(PADDING)),
        "target_mask": full.astype(np.int64),
    }
    offsets = pa.array(np.r_[begins, len(tokens)], pa.int32())
    arrays = [_lists(offsets, columns[name], k) for name in SCHEMA.names]
    return pa.table(arrays, schema=SCHEMA), int((~empty).sum())


def _lists(offsets: pa.Array, values: npt.NDArray[np.generic], k: int) -> pa.Array:
    inner = pa.array(np.ascontiguousarray(values).reshape(-1))
    if values.ndim == 2:
        inner = pa.ListArray.from_arrays(pa.array(np.arange(len(values) + 1) * k, pa.int32()), inner)
    return pa.ListArray.from_arrays(offsets, inner)
