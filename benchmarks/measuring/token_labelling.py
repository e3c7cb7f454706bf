"""Labelling tokens with a language model against the plain loop, and its draws against its forward pass.

The model is one in a folder, or a fresh Llama of SmolLM2-135M's shape (30 layers of 576, 49,152 ids), since weights change no time. Times
are of this process's processors; each repetition runs both ways in turn, and ratios are of medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distilbeam.inputs.blocks import BLOCK_COLUMNS, block_fields, position_ids
from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.pipelines.config import parse_label_config
from distilbeam.pipelines.jobs.labelling import opened_job
from distilbeam.teacher.softlabels import SoftLabelSpec
from distilbeam.teacher.softlabels.selecting import row_uniforms
from distilbeam.teacher.tokens.encoding import encode_positions, positions_at_once

IDS = 49_152
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


def blocks_of(count: int, length: int, ids: int = IDS) -> pa.Table:
    """Make blocks of random tokens in segments of 20 to length tokens."""
    rng = np.random.default_rng(0)
    begins = rng.random((count, length)) < 1 / min(200, length / 2)
    segments = np.cumsum(begins, axis=1) + 1
    values = (rng.integers(ids, size=(count, length)), segments, np.ones((count, length)))
    columns: dict[str, pa.Array] = {"example_id": pa.array([f"b{i}" for i in range(count)])}
    for field, array in zip(block_fields(length), values, strict=True):
        flat = pa.array(array.reshape(-1).astype(field.type.value_type.to_pandas_dtype()))
        columns[field.name] = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
    return pa.table(columns, schema=pa.schema([pa.field("example_id", pa.string()), *block_fields(length)]))


def labelling(
    folder: Path, *, blocks: int, length: int, k: int, layers: int, repetitions: int, model: Path | None = None
) -> dict[str, Any]:
    """Compare the label phase with a loop of forward pass, top-k and one Parquet file.

    Args:
      folder: for the files.
      blocks: rows of the pool.
      length: tokens of each.
      k: classes of a label.
      layers: of a fresh model.
      repetitions: of both ways, after one that is not counted.
      model: folder of a model instead of a fresh one.

    Returns:
      Tokens a second of processor time of both ways, and what draws take beside the forward pass.
    """
    if model is None:
        write_model(folder / "model", layers)
    at = model or folder / "model"
    (folder / "pool").mkdir()
    table = blocks_of(blocks, length, load_tokenizer(str(at), "--model").num_classes)
    pq.write_table(table, folder / "pool" / "blocks.parquet")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32).eval()
    batch = max(1, 2048 // length)
    ways: dict[str, Callable[[int], None]] = {
        "plain loop": lambda number: _plain(plain, table, k, batch, folder / f"plain-{number}.parquet"),
        "label phase": lambda number: _phase(folder, at, k, batch * length, number),
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
        "model": "fresh" if model is None else model.resolve().name,
        "parameters": sum(p.numel() for p in plain.parameters()),
        "tokens": blocks * length,
        "k": k,
        "processor_s": {name: [round(s, 3) for s in found] for name, found in seconds.items()},
        "tokens_per_processor_s": {name: round(blocks * length / s, 1) for name, s in medians.items()},
        "rate of the label phase / plain loop": round(medians["plain loop"] / medians["label phase"], 3),
        "draws": _draws(plain, table, length, repetitions),
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


def _phase(folder: Path, model: Path, k: int, batch_tokens: int, number: int) -> None:
    config = parse_label_config(
        {
            "run": {"directory": str(folder / f"job-{number}")},
            "data": {"pool": str(folder / "pool")},
            "teacher": {
                "kind": "causal_lm",
                "model": str(model),
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
    spec = spec_of(length, "sampled", 32)
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


def spec_of(length: int, kind: Any, k: int) -> SoftLabelSpec:
    """Give the specification of labels of random blocks."""
    return SoftLabelSpec(
        IDS, kind, k, teacher="t", carried=BLOCK_COLUMNS, unit="token", sequence_length=length, tokenizer="t"
    )
