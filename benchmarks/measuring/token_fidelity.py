"""What a label of a token weighs, and how much of the teacher is left in it: our forms and DistillKit's, on real text.

    bytes        of Parquet files of the labels, by token; without the blocks' own columns
    bucket KL    sum over the kept classes and the bucket of all others of p log(p / stored), in nats; draws keep no distribution
    angle        between the gradient of a last layer over all tokens that the label gives and the one that all classes give, where
                 the student has the teacher's hidden states and logits of half their size
    at teacher   norm of that gradient where the student is the teacher, where all classes give 0, over the norm of the other one:
                 what draws leave there is noise, which more tokens average away, what truncation leaves is not

What a form leaves out is where its loss puts it: in a tail (top-k), nowhere (`truncated`, and DistillKit's
`missing_probability_handling: zero`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.kernels.labels import DenseLabels, Labels, SampledLabels, TopKLabels
from distilbeam.kernels.linear_distillation.interface import linear_distill_loss
from distilbeam.pipelines.examples.lm import python_texts
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels, write_shard
from distilbeam.teacher.softlabels.selecting import row_uniforms
from distilbeam.teacher.softlabels.token_labels import decode_tokens, encode_tokens
from distilbeam.teacher.tokens.encoding import encode_positions
from measuring.token_decoding import RECOMMENDED

FORMS = (
    *(("sampled", k) for k in (12, 25, 50)),
    *(("top_k", k) for k in (8, 20, 32, 64, 128)),
)
# DistillKit's two presets, but for d
PRESETS: dict[str, dict[str, Any]] = {
    "DistillKit, recommended": {"k": 128, **RECOMMENDED},
    "DistillKit, budget": {"k": 50, **RECOMMENDED, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
}


class _Text:
    """Hidden states, logits and next tokens of a model on Python's documentation.

    Attributes:
      hidden: float32 [N, H].
      logprobs: float64 [N, C].
      tokens: int64 [N].
      head: float32 [C, H].
    """

    @torch.inference_mode()
    def __init__(self, folder: Path, blocks: int, length: int) -> None:
        from transformers import AutoModelForCausalLM

        tokenizer = load_tokenizer(str(folder), "--model")
        self.classes = tokenizer.num_classes
        ids: list[int] = []
        for text in python_texts():
            ids += tokenizer.tokenizer(text)["input_ids"]
            if len(ids) >= blocks * (length + 1):
                break
        rows = torch.tensor(ids[: blocks * (length + 1)]).view(blocks, -1)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        states = model.base_model(input_ids=rows[:, :-1], use_cache=False)[0]
        self.hidden = states.flatten(0, 1).clone()
        self.tokens = rows[:, 1:].flatten()
        self.head = model.get_output_embeddings().weight[: self.classes].clone()
        self.logits = self.hidden @ self.head.T
        self.logprobs = self.logits.double().log_softmax(1)
        self.blocks, self.length = blocks, length

    def gradient(self, labels: Labels, objective: str, scale: float = 0.5) -> Tensor:
        """Give the gradient of the last layer of a student whose logits are so many times the teacher's, [C, H]."""
        weight = (scale * self.head).requires_grad_()
        linear_distill_loss(self.hidden.clone(), weight, None, labels, objective=objective).backward()
        assert weight.grad is not None
        return weight.grad


def fidelity(model: Path, folder: Path, *, blocks: int, length: int) -> Iterator[dict[str, Any]]:
    """Measure every form.

    Args:
      model: folder of a causal language model.
      folder: for the files.
      blocks: of text.
      length: tokens of a block that are labelled.

    Yields:
      A row for each form.
    """
    text = _Text(model, blocks, length)
    whole = text.gradient(DenseLabels(text.logprobs.float()), "kl")
    about = {"model": model.resolve().name, "tokens": blocks * length, "classes": text.classes}
    for kind, k in FORMS:
        labels, size = _stored(text, kind, k, folder / f"{kind}-{k}")
        flat = [
            torch.from_numpy(a.reshape(len(text.tokens), -1))
            for a in (labels.logprobs, labels.classes.astype(np.int64))
        ]
        if labels.tail_logmass is None:
            sampled = SampledLabels(*flat)
            ways: dict[str, tuple[Labels, str]] = {f"{k} draws": (sampled, "sampled")}
            divergence = None
        else:
            tail = torch.from_numpy(labels.tail_logmass.reshape(-1))
            top = TopKLabels(*flat, tail)
            ways = {f"top {k}": (top, "tail"), f"top {k}, truncated": (top, "truncated_kl")}
            divergence = bucket_kl(text.logprobs, flat[1], flat[0].double(), tail.double())
        for name, (label, objective) in ways.items():
            row = {**about, "form": name, "bytes_a_token": round(size, 1)}
            yield _figures(row, divergence, text, (label, objective), whole)
    try:
        yield from _of_distillkit(text, folder, whole, about)
    except ImportError as e:
        yield {**about, "form": "DistillKit", "left out": str(e)}


def bucket_kl(logprobs: Tensor, classes: Tensor, stored: Tensor, tail: Tensor) -> float:
    """Average KL(teacher || stored) over kept classes and the bucket of all others, in nats; what is stored may not add up to 1."""
    total = torch.cat([stored, tail[:, None]], 1).logsumexp(1)
    stored, tail = stored - total[:, None], tail - total
    kept = logprobs.gather(1, classes)
    rest = torch.log1p(-kept.exp().sum(1).clamp(max=1 - 1e-12))
    parts = (kept.exp() * (kept - stored)).sum(1) + rest.exp() * (rest - tail)
    return float(parts.mean())


def _figures(
    row: dict[str, Any], divergence: float | None, text: _Text, learned: tuple[Labels, str], whole: Tensor
) -> dict[str, Any]:
    gradient = text.gradient(*learned)
    cosine = float(torch.nn.functional.cosine_similarity(gradient.flatten().double(), whole.flatten().double(), dim=0))
    kl = {} if divergence is None else {"bucket_kl": float(f"{divergence:.2e}")}
    angle = {"angle_degrees": round(math.degrees(math.acos(min(1.0, cosine))), 2)}
    return {
        **row,
        **kl,
        **angle,
        "at_teacher": round(float(text.gradient(*learned, scale=1.0).norm() / whole.norm()), 3),
    }


def _stored(text: _Text, kind: Any, k: int, folder: Path) -> tuple[TokenLabels, float]:
    """Label, write, read back; give the labels and the bytes of a token."""
    spec = SoftLabelSpec(text.classes, kind, k, teacher="t", unit="token", sequence_length=text.length, tokenizer="t")
    uniforms = row_uniforms(np.arange(len(text.tokens), dtype=np.uint64), k) if kind == "sampled" else None
    classes, logprobs, tail, token = encode_positions(text.logits, text.tokens, spec, uniforms)
    shape = (text.blocks, text.length)
    labels = TokenLabels(
        classes.reshape(*shape, k),
        logprobs.reshape(*shape, k),
        None if tail is None else tail.reshape(shape),
        token.reshape(shape),
    )
    columns = encode_tokens(labels, spec)
    table = pa.table({"example_id": [f"b{i}" for i in range(text.blocks)]})
    for field, column in zip(columns.schema, columns.columns, strict=True):
        table = table.append_column(field, column)
    write_shard(folder, "s", table, spec, "k")
    (file,) = folder.glob("*.parquet")
    return decode_tokens(pq.read_table(file), spec), file.stat().st_size / len(text.tokens)


def _of_distillkit(text: _Text, folder: Path, whole: Tensor, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    for name, preset in PRESETS.items():
        compressor = LogprobCompressor(DistributionQuantizationConfig(d=text.classes, **preset))
        rows = text.logprobs.float().view(text.blocks, text.length, -1)
        packed = compressor.compress(rows)
        file = folder / f"{name}.parquet"
        lists = {column: pa.array(value.tolist(), _BYTES) for column, value in packed.items()}
        pq.write_table(pa.table(lists), file)  # as its writer does
        classes, stored = (value.flatten(0, 1) for value in compressor.decompress_to_sparse(packed))
        kept = stored.double()
        tail = torch.log1p(-kept.exp().sum(1).clamp(max=1 - 1e-6))
        row = {**about, "form": name, "bytes_a_token": round(file.stat().st_size / len(text.tokens), 1)}
        labels = TopKLabels(kept.float(), classes, tail.float())
        yield _figures(row, bucket_kl(text.logprobs, classes, kept, tail), text, (labels, "truncated_kl"), whole)


_BYTES = pa.list_(pa.list_(pa.uint8()))
