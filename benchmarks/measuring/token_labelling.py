"""Labelling tokens with a language model against the plain loop, its draws against its forward pass, and reading them back.

The model is a fresh Llama of SmolLM2-135M's shape (30 layers of 576, 49,152 ids), since weights change no time. Times are of this
process's processors; each repetition runs both ways in turn, and ratios are of medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distilbeam.inputs.blocks import BLOCK_COLUMNS, block_fields, position_ids
from distilbeam.pipelines.config import parse_label_config
from distilbeam.pipelines.jobs.labelling import opened_job
from distilbeam.student.data import TokenLabelDataset
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels, write_shard
from distilbeam.teacher.softlabels.selecting import row_uniforms
from distilbeam.teacher.softlabels.token_labels import encode_tokens
from distilbeam.teacher.tokens.encoding import encode_positions, positions_at_once

IDS = 49_152
_PASSES = 3  # over the labels: memory is used again after the first, as in a training
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def write_model(folder: Path, layers: int) -> None:
    """Write a fresh model, and a tokenizer of as many ids, which names each by its number."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(IDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", unk_token="t0").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=IDS, max_position_embeddings=2048, **{**SHAPE, "num_hidden_layers": layers})
    LlamaForCausalLM(config).save_pretrained(folder)


def blocks_of(count: int, length: int) -> pa.Table:
    """Make blocks of random tokens in segments of 20 to length tokens."""
    rng = np.random.default_rng(0)
    begins = rng.random((count, length)) < 1 / min(200, length / 2)
    segments = np.cumsum(begins, axis=1) + 1
    values = (rng.integers(IDS, size=(count, length)), segments, np.ones((count, length)))
    columns: dict[str, pa.Array] = {"example_id": pa.array([f"b{i}" for i in range(count)])}
    for field, array in zip(block_fields(length), values, strict=True):
        flat = pa.array(array.reshape(-1).astype(field.type.value_type.to_pandas_dtype()))
        columns[field.name] = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
    return pa.table(columns, schema=pa.schema([pa.field("example_id", pa.string()), *block_fields(length)]))


def labelling(folder: Path, *, blocks: int, length: int, k: int, layers: int, repetitions: int) -> dict[str, Any]:
    """Compare the label phase with a loop of forward pass, top-k and one Parquet file."""
    write_model(folder / "model", layers)
    (folder / "pool").mkdir()
    table = blocks_of(blocks, length)
    pq.write_table(table, folder / "pool" / "blocks.parquet")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    batch = max(1, 2048 // length)
    ways: dict[str, Callable[[int], None]] = {
        "plain loop": lambda number: _plain(model, table, k, batch, folder / f"plain-{number}.parquet"),
        "label phase": lambda number: _phase(folder, k, batch * length, number),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repetitions + 1):
        for name, way in ways.items():
            begun = time.process_time()
            way(number)
            if number:  # the first loads the teacher and warms up
                seconds[name].append(time.process_time() - begun)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "tokens": blocks * length,
        "k": k,
        "processor_s": {name: [round(s, 3) for s in found] for name, found in seconds.items()},
        "tokens_per_processor_s": {name: round(blocks * length / s, 1) for name, s in medians.items()},
        "rate of the label phase / plain loop": round(medians["plain loop"] / medians["label phase"], 3),
        "draws": _draws(model, table, length, repetitions),
    }


@torch.inference_mode()
def _plain(model: Any, table: pa.Table, k: int, batch: int, out: Path) -> None:
    ids, segments = (np.array(table[name].to_pylist()) for name in BLOCK_COLUMNS[:2])
    kept: list[tuple[Any, Any]] = []
    for start in range(0, len(ids), batch):
        rows = slice(start, start + batch)
        places = torch.from_numpy(position_ids(segments[rows]))
        logits = model(input_ids=torch.from_numpy(ids[rows]), position_ids=places, use_cache=False).logits
        values, classes = torch.topk(torch.log_softmax(logits.float(), dim=-1), k, dim=-1)
        kept.append((classes.numpy().reshape(len(logits), -1), values.numpy().reshape(len(logits), -1)))
    width = kept[0][0].shape[1]
    columns = [np.concatenate(part) for part in zip(*kept, strict=True)]
    lists = [pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), width) for column in columns]
    pq.write_table(
        table.append_column("classes", lists[0]).append_column("logprobs", lists[1]), out, compression="zstd"
    )


def _phase(folder: Path, k: int, batch_tokens: int, number: int) -> None:
    config = parse_label_config(
        {
            "run": {"directory": str(folder / f"job-{number}")},
            "data": {"pool": str(folder / "pool")},
            "teacher": {
                "kind": "causal_lm",
                "model": str(folder / "model"),
                "batch_tokens": batch_tokens,
                "device": "cpu",
            },
            "labels": {"kind": "top_k", "k": k},
        }
    )
    with opened_job(config) as job:
        work, plan = job.work(job.dataset, job.dead_letters), job.plan()
        for task in plan.tasks:
            work.settle(list(work(task)))


@torch.inference_mode()
def _draws(model: Any, table: pa.Table, length: int, repetitions: int) -> dict[str, Any]:
    """Compare drawing 32 classes of each position with the forward pass that gave the logits."""
    spec = _spec(length, "sampled", 32)
    ids = torch.tensor(table["input_ids"].to_pylist()[:1])
    forward, draws = [], []
    for _ in range(repetitions):
        begun = time.process_time()
        logits = model(input_ids=ids, use_cache=False).logits[0]
        forward.append(time.process_time() - begun)
        begun = time.process_time()
        for start in range(0, length, positions_at_once(spec)):
            rows = slice(start, start + positions_at_once(spec))
            count = len(logits[rows])
            uniforms = row_uniforms(np.arange(count, dtype=np.uint64), 32)
            encode_positions(logits[rows], ids[0, rows], spec, uniforms)
        draws.append(time.process_time() - begun)
    one, other = statistics.median(forward), statistics.median(draws)
    return {
        "forward_us_a_token": round(one / length * 1e6, 1),
        "draws_us_a_token": round(other / length * 1e6, 1),
        "draws / forward": round(other / one, 4),
    }


def decoding(folder: Path, *, blocks: int, length: int, k: int, repetitions: int) -> dict[str, Any]:
    """Compare tokens a second from Parquet to tensors: our loader, and Hugging Face datasets, streaming, as torch."""
    spec = _spec(length, "top_k", k)
    _write_labels(folder / "labels", blocks, spec)
    dataset = TokenLabelDataset(folder / "labels", batch_size=8, seed=0, cache_bytes=0)
    ways: dict[str, Callable[[], int]] = {
        "TokenLabelDataset": lambda: _ours(dataset),
        "datasets, streaming": lambda: _datasets(folder / "labels", length, k, shuffled=False),
        "datasets, streaming and shuffled": lambda: _datasets(folder / "labels", length, k, shuffled=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repetitions + 1):
        for name, way in ways.items():
            begun = time.process_time()
            read = sum(way() for _ in range(_PASSES))
            if read != _PASSES * blocks:
                raise RuntimeError(f"{name} read {read:,} of {_PASSES * blocks:,} blocks")
            if number:
                seconds[name].append((time.process_time() - begun) / _PASSES)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    size = sum(file.stat().st_size for file in (folder / "labels").glob("*.parquet"))
    return {
        "tokens": blocks * length,
        "k": k,
        "bytes_a_token": round(size / (blocks * length), 1),
        "tokens_per_processor_s": {name: round(blocks * length / s) for name, s in medians.items()},
        "ours (shuffled) / datasets": round(medians["datasets, streaming"] / medians["TokenLabelDataset"], 2),
        "ours (shuffled) / datasets, shuffled": round(
            medians["datasets, streaming and shuffled"] / medians["TokenLabelDataset"], 2
        ),
    }


def _ours(dataset: TokenLabelDataset) -> int:
    return sum(len(batch["row"]) for batch in dataset)


def _datasets(labels: Path, length: int, k: int, *, shuffled: bool) -> int:
    """Read and shape each block as a training would: the columns as tensors, labels [L, k]; ours is always shuffled."""
    from datasets import load_dataset

    read = 0
    files = [str(file) for file in sorted(labels.glob("*.parquet"))]
    names = [
        "input_ids",
        "segment_ids",
        "completion_mask",
        "teacher_classes",
        "teacher_logprobs",
        "teacher_tail_logmass",
    ]
    stream = load_dataset("parquet", data_files=files, split="train", streaming=True).select_columns(names)
    if shuffled:
        stream = stream.shuffle(seed=0, buffer_size=128)
    for batch in stream.with_format("torch").iter(batch_size=8):
        for name in ("teacher_classes", "teacher_logprobs"):
            batch[name].view(-1, length, k)
        read += len(batch["input_ids"])
    return read


def _write_labels(out: Path, blocks: int, spec: SoftLabelSpec) -> None:
    """Write random labels that are as large as a teacher's."""
    rng, length, k = np.random.default_rng(0), spec.sequence_length or 0, spec.k or 0
    for number, table in enumerate(_slices(blocks_of(blocks, length), 128)):
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


def _slices(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    yield from (table.slice(start, rows) for start in range(0, table.num_rows, rows))


def _spec(length: int, kind: Any, k: int) -> SoftLabelSpec:
    return SoftLabelSpec(
        IDS, kind, k, teacher="t", carried=BLOCK_COLUMNS, unit="token", sequence_length=length, tokenizer="t"
    )
