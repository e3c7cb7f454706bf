"""CLINC150: 150 intents of short queries (Larson et al. 2019), read from a Parquet file with sentence embeddings.

The teacher is a linear head on the sentence embedding, trained on some labels per intent; the student sees the text
alone, as a bag of hashed words and pairs of words. A real distillation that takes seconds.
"""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks.science.problems import Dataset, Indices, Problem, about, split
from benchmarks.science.teachers import teacher_answers
from distilbeam.student.data.labelled import read_examples
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig

# labels per intent; the weakest teacher sees the first 64 numbers of the embedding alone
TEACHERS = {
    "1 per intent, 64 numbers": {"labels": 1, "numbers": 64},
    **{f"{count} per intent": {"labels": count, "numbers": 384} for count in (1, 2, 10)},
}
SIZES = {"labelled": 500, "validation": 500, "pool": 8_000}
STUDENT = StudentConfig(
    kind="text",
    dim=64,
    hidden=(),
    input={"kind": "text", "columns": ["text"], "buckets": 4096, "ngram_form": "ids", "max_length": 32},
)
TRAINING = TrainConfig(batch_size=128, lr=3e-2, weight_decay=1e-2)
STEPS = 200
HEAD = StudentConfig(kind="linear", input={"columns": ["embedding"]})
HEAD_TRAINING = TrainConfig(batch_size=64, lr=3e-2, weight_decay=1e-3)
HEAD_STEPS = 400
ABOUT = about(SIZES, STEPS, student=STUDENT, training=TRAINING, teacher=HEAD, teacher_training=HEAD_TRAINING)


def clinc150(data: Path) -> Dataset:
    """Describe CLINC150 in a directory that holds clinc150.parquet."""
    return Dataset("clinc150", TEACHERS, partial(_make, data), 1, ABOUT)


@cache
def read(data: Path) -> tuple[Tensor, Tensor, Indices, tuple[str, ...]]:
    """Read ids [n, 32] of the texts, embeddings [n, 384], classes and splits of all rows; -1 is out of scope."""
    table = pq.read_table(data / "clinc150.parquet")
    names = json.loads(table.schema.metadata[b"classes"])
    truth = table["label"].to_numpy().astype(np.int64)
    texts = table.select(["text"]).append_column("label", [np.maximum(truth, 0)])
    ids = read_examples(texts, "label", names, STUDENT.input).inputs
    embeddings = np.stack(table["embedding"].to_numpy(zero_copy_only=False)).astype(np.float32)
    return ids, torch.from_numpy(embeddings), truth, tuple(table["split"].to_pylist())


def _make(data: Path, teacher: dict[str, Any], seed: int) -> Problem:
    ids, embeddings, truth, splits = read(data)
    where = np.array(splits)
    rng = np.random.default_rng([seed, 150])
    train = np.flatnonzero(where == "train")
    lesson = _per_class(train, truth, teacher["labels"], rng)
    others = np.setdiff1d(np.flatnonzero((where == "train") | (where == "val")), lesson)
    parts = split(others, SIZES, rng)
    known = np.maximum(truth, 0)
    seen = embeddings[:, : teacher["numbers"]]
    logits = teacher_answers(HEAD, HEAD_TRAINING, HEAD_STEPS, seen, known, lesson, 150, seed)
    test = np.flatnonzero(where == "test")
    vectors = embeddings.numpy()
    return Problem(
        STUDENT, TRAINING, STEPS, ids, truth, logits, **parts, test=test, seed=seed, lesson=lesson, vectors=vectors
    )


def _per_class(rows: Indices, truth: Indices, count: int, rng: np.random.Generator) -> Indices:
    shuffled = rng.permutation(rows)
    return np.sort(np.concatenate([shuffled[truth[shuffled] == c][:count] for c in np.unique(truth[rows])]))
