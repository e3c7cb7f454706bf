"""Figures of a language model on blocks, against loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import small_language_trainings as small
import torch

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.student.data.token_labels import TokenLabelDataset
from distilbeam.student.language.evaluate import measure, token_bytes
from distilbeam.student.language.network import build_language_model

pytest.importorskip("transformers", reason="needs distilbeam[hf]")


def test_figures_are_those_of_loops_over_the_positions(tmp_path):
    small.write_blocks(tmp_path / "labels", tmp_path / "tokenizer", rows=5)
    blocks = TokenLabelDataset(tmp_path / "labels", 3, 0, columns=())
    tokenizer = load_tokenizer(tmp_path / "tokenizer", "tokenizer")
    student, _ = small.settings(tmp_path / "tokenizer")
    torch.manual_seed(0)
    network = build_language_model(student, tokenizer).eval()
    spec = blocks.spec
    lengths = token_bytes(tokenizer, spec.num_classes)
    found = measure(network, blocks, spec, lengths, torch.device("cpu"))
    sums = dict.fromkeys(("tokens", "bytes", "nll", "kl", "agreement", "teacher"), 0.0)
    for batch in TokenLabelDataset(tmp_path / "labels", 3, 0, columns=()):
        hidden = network.hidden(batch["input_ids"], batch["segment_ids"])
        logprobs = network.logits(hidden).detach().double().log_softmax(-1).numpy()
        for b, j in np.argwhere(batch["teacher_classes"][..., 0].numpy() >= 0):
            token, kept = int(batch["input_ids"][b, j + 1]), batch["teacher_classes"][b, j].numpy()
            p = np.exp(batch["teacher_logprobs"][b, j].double().numpy())
            tail = np.exp(float(batch["teacher_tail_logmass"][b, j]))
            q = np.exp(logprobs[b, j])
            rest = sum(q[c] for c in range(spec.num_classes) if c not in set(kept.tolist()))
            sums["tokens"] += 1
            sums["bytes"] += lengths[token]
            sums["nll"] -= logprobs[b, j][token]
            sums["teacher"] -= float(batch["teacher_token_logprob"][b, j])
            sums["kl"] += (p * np.log(p / q[kept])).sum() + tail * np.log(tail / rest)
            sums["agreement"] += kept[p.argmax()] == q.argmax()
    assert found["tokens"] == sums["tokens"]
    assert found["nll"] == pytest.approx(sums["nll"] / sums["tokens"], rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(sums["nll"] / np.log(2) / sums["bytes"], rel=1e-5)
    assert found["teacher_nll"] == pytest.approx(sums["teacher"] / sums["tokens"], rel=1e-5)
    assert found["kl"] == pytest.approx(sums["kl"] / sums["tokens"], rel=1e-4)
    assert found["agreement"] == pytest.approx(sums["agreement"] / sums["tokens"])


def test_blocks_without_a_label_are_refused():
    with pytest.raises(ValueError, match="must have labelled positions to measure a language model on, there is none"):
        measure(None, [], None, np.zeros(1, np.int64), torch.device("cpu"))
