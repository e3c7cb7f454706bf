"""Small trainings that use everything that has a state: for tests that kill them, or run them in several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from problem import CLASSES, FEATURES, make_table

from distilbeam.student.checkpoint import load_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig
from distilbeam.teacher.softlabels import SoftLabelSpec, encode, write_shard

NAMES = tuple(f"class {i}" for i in range(CLASSES))
PIXELS = 8


def teacher_logits(table: pa.Table) -> np.ndarray:
    """The true posterior of `make_table`'s classes, a linear function."""
    x = np.stack(table["x"].to_numpy())
    return (1.5 * x[:, :CLASSES]).astype(np.float32)


def write_vectors(directory: Path, rows: int = 90, kind: str = "dense") -> dict[str, Any]:
    """Write soft labels of vectors; return the data arguments of `train`."""
    pool, validation = make_table(rows, 1, labelled=False), make_table(60, 3, labelled=True)
    _write_labels(directory, pool.select(["x"]), teacher_logits(pool), kind)
    return {
        "classes": NAMES,
        "labelled": make_table(30, 2, labelled=True),
        "label_column": "label",
        "soft_labels": [directory],
        "validation": validation,
        "validation_teacher": _logprobs(teacher_logits(validation)),
    }


def write_images(directory: Path, rows: int = 60) -> dict[str, Any]:
    """Write soft labels of noisy images; return the data arguments of `train`."""
    pool, labelled, validation = (_images(count, seed) for count, seed in ((rows, 1), (20, 2), (40, 3)))
    _write_labels(
        directory, pool.select(["x"]), 4 * np.eye(CLASSES, dtype=np.float32)[pool["label"].to_numpy()], "dense"
    )
    return {
        "classes": NAMES,
        "labelled": labelled,
        "label_column": "label",
        "soft_labels": [directory],
        "validation": validation,
    }


def settings(kind: str, dropout: float = 0.2, **changes: Any) -> tuple[StudentConfig, TrainConfig]:
    """Give a student and a training in which everything that has a state takes part."""
    if kind == "vectors":
        student = StudentConfig(
            kind="mlp", hidden=(8, 8), dropout=dropout, residual="laurel-rw", input={"columns": ["x"]}
        )
        training = {
            "objective": "weighted",
            "reestimate_epochs": 2,
            "ema": 0.9,
            "augment": {"mixup": 0.3, "label_smoothing": 0.1},
        }
    else:
        shape = {"columns": ["x"], "shape": [1, PIXELS, PIXELS]}
        student = StudentConfig(kind="cnn", width=0.05, dropout=dropout, input=shape)
        training = {"optimizer": "sgd", "lr": 0.05, "augment": {"flip": True, "crop": 2}}
    common = {"epochs": 5, "batch_size": 16, "checkpoint_steps": 2, "checkpoint_seconds": 1e9}
    return student, TrainConfig.model_validate({**common, **training, **changes})


class EndlessGradient(torch.nn.Module):
    """A linear student with a square root whose gradient at 0 is not a number, though its value is."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(*input_shape, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.sqrt(0 * self.linear.bias)


class Cubed(torch.nn.Module):
    """A student whose answers are beyond float32 where an input is beyond 10^13."""

    def __init__(self, input_shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(*input_shape, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x**3)


def weights(directory: Path) -> str:
    """The fingerprint of a student that a training left."""
    return load_student(directory).fingerprint()


def features_of(kind: str) -> int:
    """How many numbers an example has."""
    return FEATURES if kind == "vectors" else PIXELS * PIXELS


def _write_labels(directory: Path, columns: pa.Table, logits: np.ndarray, kind: str) -> None:
    k = {"dense": None, "top_k": 2, "sampled": 8}[kind]
    spec = SoftLabelSpec(CLASSES, kind=kind, k=k, classes=NAMES, teacher="t", carried=("x",))
    labels = encode(logits, spec, rng=np.random.default_rng(0))
    columns = pa.table(
        {
            "example_id": [str(i) for i in range(len(logits))],
            "x": columns["x"],
            **dict(zip(labels.schema.names, labels.columns, strict=True)),
            "weight": np.linspace(0.5, 1.5, len(logits), dtype=np.float32),
        }
    )
    half = len(logits) // 2
    for number, part in enumerate((columns.slice(0, half), columns.slice(half))):
        write_shard(directory, f"shard-{number}", part, spec, f"{kind}{number}")


def _images(rows: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    x = rng.normal(size=(rows, PIXELS, PIXELS)).astype(np.float32)
    for value, image in zip(labels, x, strict=True):
        image[:, 2 * value : 2 * value + 2] += 2
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), PIXELS * PIXELS)
    return pa.table({"x": vectors, "label": labels})


def _logprobs(logits: np.ndarray) -> np.ndarray:
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
