"""Small trainings of language models on labels of blocks: for tests that kill them, or run them in several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from language_models import blocks_of, labelled, write_tokenizer

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.student.language.config import LanguageModelConfig, TokenTrainConfig
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels, write_shard

LENGTH, VOCABULARY = 16, 280
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}


def markov_logits(ids: np.ndarray, vocabulary: int = VOCABULARY) -> np.ndarray:
    """What a teacher that looks at the last token alone says of the next one, float64 [..., vocabulary]."""
    table = np.random.default_rng(5).normal(size=(vocabulary, 8)) @ np.random.default_rng(6).normal(
        size=(8, vocabulary)
    )
    return 0.7 * table[ids]


def write_blocks(directory: Path, folder: Path, rows: int = 48, kind: str = "top_k", seed: int = 0, k: int = 8) -> Path:
    """Write labelled blocks of two or three texts with padding behind, whose masks leave a prompt out; return the directory.

    Args:
      directory: of the dataset.
      folder: of the tokenizer, which is written where there is none.
      rows: number of blocks; the last one is masked whole.
      kind: of the labels.
      seed: of the tokens and draws.
      k: classes or draws of a label.
    """
    if not folder.exists():
        write_tokenizer(folder, vocabulary=VOCABULARY)
    tokenizer = load_tokenizer(folder, "tokenizer")
    vocabulary = tokenizer.num_classes
    rng = np.random.default_rng(seed)
    segments = np.zeros((rows, LENGTH), np.int64)
    for row in segments:
        cut, end = sorted(rng.choice(np.arange(3, LENGTH + 1), 2, replace=False))
        row[:cut], row[cut:end] = 1, 2
    mask = (segments > 0) & ~((segments == 1) & (np.arange(LENGTH) < 2))
    mask[-1] = False
    blocks = blocks_of(segments, seed, vocabulary, mask)
    spec = SoftLabelSpec(
        vocabulary,
        kind=kind,
        k=k,
        teacher="markov",
        unit="token",
        sequence_length=LENGTH,
        tokenizer=tokenizer.fingerprint(),
    )
    table = labelled(blocks, markov_labels(blocks, spec, seed), spec)
    half = rows // 2
    for number, part in enumerate((table.slice(0, half), table.slice(half))):
        write_shard(directory, f"shard-{number}", part, spec, f"{kind}{number}{seed}")
    return directory


def markov_labels(blocks: pa.Table, spec: SoftLabelSpec, seed: int) -> TokenLabels:
    """Label the blocks by `markov_logits`, the top k or k draws."""
    from distilbeam.inputs.blocks import has_label

    rng = np.random.default_rng([seed, 1])
    ids, segments, mask = (
        np.array(blocks[name].to_pylist()) for name in ("input_ids", "segment_ids", "completion_mask")
    )
    found = TokenLabels.empty(len(ids), spec)
    k = spec.k or 0
    for b, j in np.argwhere(has_label(segments, mask)):
        logits = markov_logits(ids[b, j], spec.num_classes)
        logprobs = logits - np.logaddexp.reduce(logits)
        found.token_logprob[b, j] = logprobs[ids[b, j + 1]]
        if spec.kind == "top_k":
            kept = np.argsort(-logprobs)[:k]
            found.classes[b, j], found.logprobs[b, j] = kept, logprobs[kept]
            assert found.tail_logmass is not None
            found.tail_logmass[b, j] = np.log1p(-np.exp(logprobs[kept]).sum())
        else:
            drawn, counts = np.unique(rng.choice(spec.num_classes, k, p=np.exp(logprobs)), return_counts=True)
            found.classes[b, j, : len(drawn)], found.classes[b, j, len(drawn) :] = drawn, -1
            found.logprobs[b, j] = -np.inf
            found.logprobs[b, j, : len(drawn)] = np.log(counts / k)
    return found


def settings(
    folder: Path, config: dict[str, Any] | None = None, **changes: Any
) -> tuple[LanguageModelConfig, TokenTrainConfig]:
    """Give a small Llama and a training of it."""
    student = LanguageModelConfig(config={**LLAMA, **(config or {})}, tokenizer=str(folder))
    common = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "checkpoint_steps": 2, "checkpoint_seconds": 1e9}
    return student, TokenTrainConfig.model_validate({**common, **changes})


class Recurrent(torch.nn.Module):
    """A language model of one's own, a bag of the last tokens of its text: a backbone and a head."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.backbone = _LastTwo(num_classes, width)
        self.head = torch.nn.Linear(width, num_classes)


class _LastTwo(torch.nn.Module):
    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(num_classes, width)
        self.mix = torch.nn.Linear(2 * width, width)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,  # noqa: ARG002
    ) -> torch.Tensor:
        now = self.embedding(input_ids)
        before = torch.roll(now, 1, 1) * (position_ids > 0)[..., None]
        return torch.tanh(self.mix(torch.cat([now, before], -1)))
