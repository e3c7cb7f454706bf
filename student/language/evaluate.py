"""Figures of a language model on labelled blocks: bits per byte, and how it compares with the teacher.

    bits per byte   -sum log2 q(token) / bytes of these tokens' text         comparable between tokenizers
    nll, perplexity of a token, and the teacher's own nll on the same tokens
    kl              of top-k labels, in nats: sum over the k classes and the bucket of all others of p log(p/q)
    agreement       of top-k labels: positions where both have the same most probable token

All at temperature 1 and over the labelled positions of the blocks alone. Draws give neither divergence nor agreement without bias.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from distilbeam.inputs.tokenizer import TokenizerFolder
from distilbeam.student.data.token_labels import TokenLabelDataset
from distilbeam.student.language.folder import LanguageModel, load_language_model
from distilbeam.student.language.network import CausalLm, require_suits
from distilbeam.student.language.step import Batch, Positions
from distilbeam.student.language.threads import forward_operations, threads_for
from distilbeam.teacher.softlabels import SoftLabelSpec

CHUNK = 1024  # positions whose logits are held
BLOCKS = 8  # in a forward pass
GIVEN = 24  # tokens of a text that are given to be continued, and that are added at most
_BYTE_LEVEL = "ByteLevel"


def evaluate_language_model(directory: Path, labels: Path, trust: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a trained student on labelled blocks, and let it continue the beginning of one.

    Args:
      directory: of the student.
      labels: directory of token labels, of blocks that it has not learned.
      trust: see `load_language_model`.

    Returns:
      What `measure` gives, and `given` and `continued`: the beginning of a text, and the same with what the student adds.

    Raises:
      ValueError: the directory holds no language model, or the labels are of examples or of another tokenizer.
    """
    model = load_language_model(directory, trust)
    blocks = TokenLabelDataset(labels, BLOCKS, 0, columns=())
    spec = blocks.spec
    model.tokenizer.require_same(spec.tokenizer, spec.num_classes, f"the labels in {labels}")
    require_suits(model.network, spec.num_classes, spec.sequence_length or 0)
    given = beginning(model, labels)
    found = measure(model.network, blocks, spec, token_bytes(model.tokenizer, spec.num_classes), torch.device("cpu"))
    return {**found, "given": given, "continued": model.complete(given, GIVEN)}


def beginning(model: LanguageModel, labels: Path) -> str:
    """Take the beginning of a text of labelled blocks, to be continued: the same one each time.

    Args:
      model: whose tokenizer reads it.
      labels: directory of token labels.
    """
    first = next(iter(TokenLabelDataset(labels, 1, 0, columns=())))
    ids = first["input_ids"][0][first["segment_ids"][0] == first["segment_ids"][0, 0]]
    return str(model.tokenizer.tokenizer.decode(ids[: max(1, min(GIVEN, len(ids) // 2))].tolist()))


def token_bytes(tokenizer: TokenizerFolder, num_classes: int) -> npt.NDArray[np.int64]:
    """Count the bytes of text that each id stands for; special tokens stand for none.

    Args:
      tokenizer: the tokenizer.
      num_classes: number of ids.

    Returns:
      int64 [num_classes].
    """
    parts = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    byte_level = _BYTE_LEVEL in json.dumps([parts.get("pre_tokenizer"), parts.get("decoder")])
    added = tokenizer.tokenizer.added_tokens_decoder
    counts = np.zeros(num_classes, np.int64)
    for token, place in tokenizer.vocabulary.items():
        if place >= num_classes:
            continue
        if place in added:
            counts[place] = 0 if added[place].special else len(str(added[place].content).encode())
        elif byte_level:  # its alphabet has a letter for each byte
            counts[place] = len(token)
        elif token.startswith("<0x") and token.endswith(">") and len(token) == 6:
            counts[place] = 1
        else:  # sentencepiece writes a space as one letter, wordpiece a join as two
            counts[place] = len(token.replace("▁", " ").removeprefix("##").encode())
    return counts


@torch.inference_mode()
def measure(
    network: CausalLm,
    batches: Iterable[Batch],
    spec: SoftLabelSpec,
    lengths: npt.NDArray[np.int64],
    device: torch.device,
) -> dict[str, float]:
    """Measure a language model on labelled blocks; see the module.

    Args:
      network: on its device, in evaluation mode.
      batches: of `TokenLabelDataset`.
      spec: of the labels.
      lengths: from `token_bytes`.
      device: where the network is.

    Returns:
      `tokens`, `bytes`, `nll`, `bits_per_byte`, `perplexity`, `teacher_nll` and `teacher_bits_per_byte` where the labels say them, and
      of top-k labels `kl` and `agreement`.

    Raises:
      ValueError: no position has a label.
    """
    sums: dict[str, float] = dict.fromkeys(("tokens", "bytes", "nll", "teacher_nll", "kl", "agreement"), 0.0)
    for batch in batches:
        if len(batch["input_ids"]):
            operations = forward_operations(network, spec.num_classes, batch["input_ids"].numel())
            with threads_for(operations, device):
                found = _of_batch(network, batch, spec, lengths, device)
            for name, value in found.items():
                sums[name] += value
    tokens, size = sums["tokens"], max(sums["bytes"], 1.0)
    if not tokens:
        raise ValueError("the blocks must have labelled positions to measure a language model on, there is none")
    figures = {
        "tokens": tokens,
        "bytes": sums["bytes"],
        "nll": sums["nll"] / tokens,
        "bits_per_byte": sums["nll"] / np.log(2) / size,
        "perplexity": float(np.exp(min(sums["nll"] / tokens, 700.0))),
    }
    if np.isfinite(sums["teacher_nll"]):  # converted labels may not say the log-probability of each token
        figures |= {
            "teacher_nll": sums["teacher_nll"] / tokens,
            "teacher_bits_per_byte": sums["teacher_nll"] / np.log(2) / size,
        }
    if spec.kind == "top_k":
        figures |= {name: sums[name] / tokens for name in ("kl", "agreement")}
    return {name: float(value) for name, value in figures.items()}


def _of_batch(
    network: CausalLm, batch: Batch, spec: SoftLabelSpec, lengths: npt.NDArray[np.int64], device: torch.device
) -> dict[str, float]:
    positions = Positions.of(batch)
    tokens = positions.tokens
    teacher = batch["teacher_token_logprob"][positions.rows]
    found: dict[str, Any] = {
        "tokens": len(tokens),
        "bytes": int(lengths[tokens.numpy()].sum()),
        "teacher_nll": -float(teacher.double().sum()),
        "nll": 0.0,
    }
    hidden_bLH = network.hidden(batch["input_ids"].to(device), batch["segment_ids"].to(device))
    hidden_NH = hidden_bLH.flatten(0, 1)[positions.places.to(device)]
    labels = {name: value[positions.rows] for name, value in batch.items() if name in _LABELS}
    for start in range(0, len(tokens), CHUNK):
        rows = slice(start, start + CHUNK)
        logits_NC = network.logits(hidden_NH[rows])[:, : spec.num_classes].float()
        logprobs_NC = logits_NC.log_softmax(1).cpu()
        found["nll"] -= float(logprobs_NC.gather(1, tokens[rows, None]).double().sum())
        if spec.kind == "top_k":
            kept = {name: value[rows] for name, value in labels.items()}
            found["kl"] = found.get("kl", 0.0) + _bucketed_kl(logprobs_NC, kept)
            best = kept["teacher_classes"].gather(1, kept["teacher_logprobs"].argmax(1, keepdim=True))[:, 0]
            found["agreement"] = found.get("agreement", 0.0) + float((logprobs_NC.argmax(1) == best).double().sum())
    return found


_LABELS = ("teacher_classes", "teacher_logprobs", "teacher_tail_logmass")


def _bucketed_kl(logprobs_NC: Tensor, labels: dict[str, Tensor]) -> float:
    """Sum KL(teacher || student) over the kept classes and the bucket of all others, in float64."""
    student_Nk = logprobs_NC.gather(1, labels["teacher_classes"]).double()
    teacher_Nk = labels["teacher_logprobs"].double()
    p_Nk, tail_N = teacher_Nk.exp(), labels["teacher_tail_logmass"].double()
    rest_N = (1 - student_Nk.exp().sum(1)).clamp(min=1e-12).log()
    tail = torch.where(tail_N.isneginf(), 0.0, tail_N.exp() * (tail_N - rest_N))
    return float((p_Nk * (teacher_Nk - student_Nk)).sum() + tail.sum())
