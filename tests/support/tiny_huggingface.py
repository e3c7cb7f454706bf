"""Tiny Hugging Face parts that tests make: a tokenizer of words, texts and images of three classes, settings of fresh networks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from distilbeam.teacher.softlabels import SoftLabelSpec, encode, write_shard

NAMES = ("card", "transfer", "limit")
WORDS = ("card lost stolen", "money transfer abroad", "limit raise more")
PIXELS = 16
DISTILBERT = {
    "model_type": "distilbert",
    "dim": 16,
    "n_layers": 1,
    "n_heads": 2,
    "hidden_dim": 32,
    "max_position_embeddings": 16,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 8,
}


def write_tokenizer(path: Path) -> Path:
    """Write a tokenizer.json of the words, with the special tokens of BERT."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = sorted({word for line in WORDS for word in line.split()} | {"please", "now"})
    vocabulary = {name: place for place, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    return path


def texts(rows: int, seed: int) -> pa.Table:
    """Draw texts of their class's words and others, with their class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(NAMES), rows)
    lines = [" ".join(rng.permutation((WORDS[c] + " please now").split())[: rng.integers(2, 6)]) for c in labels]
    return pa.table({"text": lines, "label": labels})


def images(rows: int, seed: int) -> pa.Table:
    """Draw noisy images whose class is a coloured stripe, as PNG."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(NAMES), rows)
    pictures = []
    for c in labels:
        pixels = rng.integers(0, 120, (PIXELS + 4, PIXELS, 3), dtype=np.uint8)
        pixels[:, 5 * c : 5 * c + 5, c] += 130
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        pictures.append(data.getvalue())
    return pa.table({"image": pa.array(pictures, pa.binary()), "label": labels})


def student_settings(kind: str, tokenizer: Path) -> dict[str, Any]:
    """Give `[student]` for a fresh network of texts or images."""
    if kind == "text":
        inputs = {"kind": "text", "columns": ["text"], "tokenizer": str(tokenizer), "max_length": 8}
        return {"kind": "huggingface", "config": DISTILBERT, "input": inputs}
    inputs = {"kind": "image", "columns": ["image"], "size": [PIXELS, PIXELS], "mean": [0.5], "std": [0.5]}
    return {"kind": "huggingface", "config": VIT, "input": inputs}


def write_data(directory: Path, kind: str, rows: int = 48) -> dict[str, Any]:
    """Write soft labels that know the class; return the data arguments of `train`."""
    table = (texts if kind == "text" else images)(rows, 1)
    column = table.column_names[0]
    spec = SoftLabelSpec(len(NAMES), classes=NAMES, teacher="t", carried=(column,))
    labels = encode(4 * np.eye(len(NAMES), dtype=np.float32)[table["label"].to_numpy()], spec)
    columns = {
        "example_id": [str(i) for i in range(rows)],
        column: table[column],
        **dict(zip(labels.schema.names, labels.columns, strict=True)),
    }
    write_shard(directory, "shard-0", pa.table(columns), spec, "key")
    return {
        "classes": NAMES,
        "labelled": (texts if kind == "text" else images)(12, 2),
        "label_column": "label",
        "soft_labels": [directory],
        "validation": (texts if kind == "text" else images)(24, 3),
    }
