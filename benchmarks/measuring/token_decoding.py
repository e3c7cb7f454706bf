"""Reading labels of tokens, from Parquet to tensors: our loader, `datasets`, and DistillKit's rows and decoder.

`datasets` is measured in the forms that people read with it, all of them streaming: our columns as torch tensors, batch by batch, which is
a copy of Arrow's buffers since the columns are flat; the same row by row as Python lists that a collator makes tensors of, as the Trainer's
`DataLoader` does; and the nested lists [L][k] in which axolotl and TRL write labels, in both ways. DistillKit's rows are read as its `prepacked`
data sets are (a memory-mapped `datasets.Dataset`, its own collator, then its decoder), and its decoder alone has tensors of bytes in memory.
Times are of this process's processors over all of its threads; each repetition runs every way in turn, each after a pass that is not
counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distilbeam.student.data import TokenLabelDataset
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels, write_shard
from distilbeam.teacher.softlabels.token_labels import encode_tokens
from measuring.token_labelling import IDS, blocks_of, spec_of

BATCH = 8
_PASSES = 3  # over the labels, after one that is not counted: memory is used again, as in a training of hours
_SHARD = 128  # blocks
NAMES = (
    "input_ids",
    "segment_ids",
    "completion_mask",
    "teacher_classes",
    "teacher_logprobs",
    "teacher_tail_logmass",
)
OURS = "TokenLabelDataset, shuffled"
Way = Callable[[], int]


def decoding(folder: Path, *, blocks: int, length: int, k: int, repetitions: int, slow_blocks: int) -> dict[str, Any]:
    """Compare tokens a second from Parquet to tensors.

    Args:
      folder: for the files.
      blocks: rows of the data set.
      length: tokens of each.
      k: classes of a label.
      repetitions: of every way, after one that is not counted.
      slow_blocks: how many of the rows are read by the ways that make Python lists.

    Returns:
      Tokens a second of processor time by way, and how many times as many ours reads.
    """
    labels = folder / "labels"
    arrays = list(_write_labels(labels, blocks, spec_of(length, "top_k", k)))
    dataset = TokenLabelDataset(labels, batch_size=BATCH, seed=0, cache_bytes=0)
    files = [str(file) for file in sorted(labels.glob("*.parquet"))]
    nested = _write_nested(folder / "nested.parquet", arrays[0], slow_blocks)
    ways: dict[str, tuple[int, Way]] = {
        OURS: (blocks, lambda: sum(len(batch["row"]) for batch in dataset)),
        "datasets, tensors": (blocks, lambda: _tensors(_stream(files), length, k)),
        "datasets, tensors, shuffled": (
            blocks,
            lambda: _tensors(_stream(files).shuffle(seed=0, buffer_size=128), length, k),
        ),
        "datasets, lists collated": (slow_blocks, lambda: _collated(_stream(files).take(slow_blocks))),
        "datasets, nested lists, tensors": (slow_blocks, lambda: _nested_tensors(nested)),
        "datasets, nested lists collated": (slow_blocks, lambda: _collated(_stream([nested], ()))),
    }
    out: dict[str, Any] = {"tokens": blocks * length, "k": k}
    try:
        ways |= _of_distillkit(folder, arrays[0], slow_blocks, k)
    except ImportError as e:
        out["left out"] = f"DistillKit: {e}"
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repetitions + 1):
        for name, (rows, way) in ways.items():
            passes = _PASSES if rows == blocks else 1
            way()
            begun = time.process_time()
            read = sum(way() for _ in range(passes))
            if read != passes * rows:
                raise RuntimeError(f"{name} read {read:,} of {passes * rows:,} blocks")
            if number:
                seconds[name].append((time.process_time() - begun) / (passes * rows * length))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    size = sum(Path(file).stat().st_size for file in files)
    return {
        **out,
        "bytes_a_token": round(size / (blocks * length), 1),
        "tokens_per_processor_s": {name: round(1 / s) for name, s in medians.items()},
        "ours / it": {name: round(s / medians[OURS], 2) for name, s in medians.items() if name != OURS},
    }


def _stream(files: list[str], names: Iterable[str] = NAMES) -> Any:
    from datasets import load_dataset

    stream = load_dataset("parquet", data_files=files, split="train", streaming=True)
    return stream.select_columns(list(names)) if names else stream


def _tensors(stream: Any, length: int, k: int) -> int:
    """Read and shape batches of our columns as torch tensors."""
    read = 0
    for batch in stream.with_format("torch").iter(batch_size=BATCH):
        for name in ("teacher_classes", "teacher_logprobs"):
            batch[name].view(-1, length, k)
        read += len(batch["input_ids"])
    return read


def _nested_tensors(file: str) -> int:
    return sum(len(batch["input_ids"]) for batch in _stream([file], ()).with_format("torch").iter(batch_size=BATCH))


def _collated(rows: Iterable[dict[str, Any]]) -> int:
    """Read rows of Python lists and make tensors of eight at a time."""
    read = 0
    for batch in _in_eights(rows):
        columns = {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}
        read += len(columns["input_ids"])
    return read


def _in_eights(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _of_distillkit(folder: Path, labels: TokenLabels, blocks: int, k: int) -> dict[str, tuple[int, Way]]:
    """Make rows in DistillKit's format and give its ways of reading them."""
    import datasets
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    compressor = LogprobCompressor(DistributionQuantizationConfig(d=IDS, k=k, **RECOMMENDED))
    classes, logprobs = (torch.from_numpy(np.ascontiguousarray(a[:blocks])) for a in (labels.classes, labels.logprobs))
    packed = compressor.compress_from_sparse(classes.long(), logprobs)
    ids = np.zeros(classes.shape[:2], np.int64)
    columns = {"input_ids": ids, **{name: value.numpy() for name, value in packed.items()}}
    pq.write_table(
        pa.table({name: pa.array(value.tolist()) for name, value in columns.items()}), folder / "packed.parquet"
    )
    rows = datasets.load_dataset(
        "parquet", data_files=str(folder / "packed.parquet"), split="train", cache_dir=str(folder)
    )

    def collated() -> int:
        read = 0
        for batch in _in_eights(rows):
            tensors = {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}
            read += len(compressor.decompress_to_sparse(tensors)[0])
        return read

    def alone() -> int:
        parts = (slice(start, start + BATCH) for start in range(0, blocks, BATCH))
        return sum(len(compressor.decompress_to_sparse({n: v[part] for n, v in packed.items()})[0]) for part in parts)

    return {"DistillKit, its rows": (blocks, collated), "DistillKit, its decoder alone": (blocks, alone)}


# DistillKit's recommended preset, but for d and k
RECOMMENDED: dict[str, Any] = {
    "exact_k": 16,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}


def _write_labels(out: Path, blocks: int, spec: SoftLabelSpec) -> Iterator[TokenLabels]:
    """Write random labels that are as large as a teacher's; give those of each shard."""
    rng, length, k = np.random.default_rng(0), spec.sequence_length or 0, spec.k or 0
    whole = blocks_of(blocks, length)
    for number, start in enumerate(range(0, blocks, _SHARD)):
        table = whole.slice(start, _SHARD)
        shape = (table.num_rows, length)
        logprobs = np.sort(rng.normal(-6, 2, (*shape, k)).astype(np.float32), axis=2)[:, :, ::-1]
        labels = TokenLabels(
            rng.integers(spec.num_classes, size=(*shape, k)).astype(np.int32),
            np.minimum(logprobs, 0),
            rng.normal(-2, 1, shape).astype(np.float32),
            rng.normal(-3, 1, shape).astype(np.float32),
        )
        columns = encode_tokens(labels, spec)
        for field, column in zip(columns.schema, columns.columns, strict=True):
            table = table.append_column(field, column)
        write_shard(out, f"s{number:04}", table, spec, f"k{number:04}")
        yield labels


def _write_nested(path: Path, labels: TokenLabels, blocks: int) -> str:
    """Write labels as lists of lists, the way axolotl and TRL have them."""
    columns = {"target_token_ids": labels.classes[:blocks], "target_logprobs": labels.logprobs[:blocks]}
    nested = {"input_ids": pa.array(np.zeros(labels.classes[:blocks].shape[:2], np.int32).tolist())}
    for name, array in columns.items():
        blocks_here, length, k = array.shape
        inner = pa.ListArray.from_arrays(
            np.arange(0, array.size + 1, k, dtype=np.int32), pa.array(np.ascontiguousarray(array).reshape(-1))
        )
        outer = np.arange(0, blocks_here * length + 1, length, dtype=np.int32)
        nested[name] = pa.ListArray.from_arrays(outer, inner)
    pq.write_table(pa.table(nested), path, compression="zstd")
    return str(path)
