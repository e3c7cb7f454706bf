"""A tokenizer trained on a few sentences, language models of a few thousand weights, and blocks of tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.blocks import BLOCK_COLUMNS, block_fields
from distilbeam.teacher.softlabels import SoftLabelSpec, TokenLabels
from distilbeam.teacher.softlabels.token_labels import encode_tokens

SENTENCES = [
    "the teacher writes a letter to the student",
    "a student reads the letter of the teacher",
    "the small model learns what the large model knows",
    "every token has a distribution over all other tokens",
    "blocks of text are packed one after another, and none sees another",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
EOS = "<|end|>"


def write_tokenizer(folder: Path, *, vocabulary: int = 300, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write a byte-level BPE tokenizer trained on `SENTENCES` as a Hugging Face folder."""
    tokenizer = _trained(vocabulary)
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


@cache
def _trained(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def write_model(folder: Path, *, vocabulary: int = 300, seed: int = 0, places: int = 128, **settings: Any) -> Path:
    """Write a fresh Llama of two layers, and a tokenizer of at most as many ids, as a Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=places, initializer_range=0.3, **shape, **settings
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


def blocks_of(
    segment_ids: npt.NDArray[Any], seed: int = 0, vocabulary: int = 300, mask: npt.NDArray[Any] | None = None
) -> pa.Table:
    """Make blocks of random tokens with given segments, and ids."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(3, vocabulary, segment_ids.shape)
    mask = (segment_ids > 0) if mask is None else mask
    columns = {"example_id": pa.array([f"block {seed} {i}" for i in range(len(segment_ids))])}
    for field, values in zip(block_fields(segment_ids.shape[1]), (input_ids, segment_ids, mask), strict=True):
        flat = pa.array(values.reshape(-1), field.type.value_type)
        columns[field.name] = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
    fields = [pa.field("example_id", pa.string()), *block_fields(segment_ids.shape[1])]
    return pa.table(list(columns.values()), schema=pa.schema(fields))


def random_labels(blocks: pa.Table, spec: SoftLabelSpec, seed: int = 0) -> TokenLabels:
    """Make labels of blocks by a distribution that is drawn at random at each position."""
    from distilbeam.inputs.blocks import has_label

    rng = np.random.default_rng(seed)
    length, k = spec.sequence_length or 0, spec.k or 0
    segments, mask = (np.array(blocks[name].to_pylist()).reshape(-1, length) for name in BLOCK_COLUMNS[1:])
    there = has_label(segments, mask)
    found = TokenLabels.empty(len(segments), spec)
    for block, place in np.argwhere(there):
        found.classes[block, place] = np.sort(rng.choice(spec.num_classes, k, replace=False))
        weights = np.sort(rng.dirichlet(np.ones(k + 1)))[::-1]
        if spec.kind == "top_k":
            found.logprobs[block, place] = np.log(weights[:k])
            assert found.tail_logmass is not None
            found.tail_logmass[block, place] = np.log(weights[k])
        else:
            distinct = int(rng.integers(1, k + 1))
            counts = np.bincount(rng.integers(distinct, size=k - distinct), minlength=distinct) + 1
            found.classes[block, place, distinct:] = -1
            found.logprobs[block, place] = -np.inf
            found.logprobs[block, place, :distinct] = np.log(counts.astype(np.float32) / np.float32(k))
        found.token_logprob[block, place] = np.log(rng.uniform(0.01, 1))
    return found


def labelled(blocks: pa.Table, labels: TokenLabels, spec: SoftLabelSpec) -> pa.Table:
    """Put labels beside their blocks, as a shard has them."""
    columns = encode_tokens(labels, spec)
    table = blocks
    for field, column in zip(columns.schema, columns.columns, strict=True):
        table = table.append_column(field, column)
    return table
