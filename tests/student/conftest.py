"""A small problem with soft labels on disk: Gaussian clusters in the plane and a teacher that knows them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from distilbeam.inputs.config import InputConfig
from distilbeam.student.networks.config import StudentConfig
from distilbeam.teacher.softlabels import SoftLabelSpec, encode, write_shard

CLASSES = ("red", "green", "blue")
CENTRES = np.array([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
INPUT = InputConfig(columns=("x",))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Problem:
    """Clusters around three centres: where a point is, and which one it came from."""

    x: np.ndarray
    y: np.ndarray

    @classmethod
    def draw(cls, rows: int, seed: int) -> Problem:
        rng = np.random.default_rng(seed)
        y = rng.integers(len(CLASSES), size=rows)
        return cls((CENTRES[y] + rng.normal(size=(rows, 2))).astype(np.float32), y)

    def teacher_logits(self) -> np.ndarray:
        """The true posterior: a linear function for clusters of one shape."""
        return (self.x @ CENTRES.T - 0.5 * (CENTRES**2).sum(1)).astype(np.float32)

    def table(self) -> pa.Table:
        return pa.table({"x": vectors(self.x), "label": self.y})


def vectors(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


@pytest.fixture
def problem() -> Callable[[int, int], Problem]:
    return Problem.draw


@pytest.fixture
def student_config() -> StudentConfig:
    return StudentConfig(kind="mlp", hidden=(16,), input=INPUT)


@pytest.fixture
def write_labels(tmp_path: Path) -> Callable[..., Path]:
    """Write a dataset whose rows are numbered by the column `number`; a shard's row groups have the given sizes."""

    def write(
        shards: list[list[int]],
        seed: int = 0,
        name: str = "labels",
        estimates: bool = True,
        first: int = 0,
        **spec_options: object,
    ) -> Path:
        options = {"num_classes": 3, "classes": CLASSES, "teacher": "t", "carried": ("x",), **spec_options}
        spec = SoftLabelSpec(**options)
        data = Problem.draw(sum(map(sum, shards)), seed)
        labels = encode(data.teacher_logits(), spec)
        count = len(data.y)
        columns = {
            "example_id": pa.array([str(first + i) for i in range(count)]),
            "number": pa.array(np.arange(first, first + count)),
            "x": vectors(data.x),
            **dict(zip(labels.schema.names, labels.columns, strict=True)),
        }
        if estimates:
            columns |= {
                "alpha": pa.array(np.linspace(0.6, 1.0, count, dtype=np.float32)),
                "candidates": pa.array(np.full(count, 2, np.int16)),
                "weight": pa.array(np.linspace(0.5, 1.5, count, dtype=np.float32)),
            }
        batch = pa.record_batch(columns)
        start = 0
        for number, groups in enumerate(shards):
            parts = []
            for size in groups:
                parts.append(batch.slice(start, size))
                start += size
            write_shard(tmp_path / name, f"shard-{number:03d}", parts, spec, f"{name}{number:03d}")
        return tmp_path / name

    return write
