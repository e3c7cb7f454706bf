"""Builders that several tests of teachers use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from served_linear import CLASSES, Linear, client

from distilbeam.teacher.softlabels import SoftLabelSpec, encode, write_shard


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261121)


@pytest.fixture
def labelled() -> Callable[..., pa.Table]:
    """Make a table of a shard from logits."""

    def make(logits: np.ndarray, spec: SoftLabelSpec, prefix: str = "row", **columns: Any) -> pa.Table:
        ids = [f"{prefix}-{i}" for i in range(len(logits))]
        labels = encode(logits, spec, rng=np.random.default_rng(1))
        return pa.table({"example_id": ids, **columns, **dict(zip(labels.schema.names, labels.columns, strict=True))})

    return make


@pytest.fixture
def dataset(tmp_path: Path, labelled: Callable[..., pa.Table]) -> Callable[..., Path]:
    """Write a dataset of a few shards and return its folder."""

    def make(spec: SoftLabelSpec, rows: tuple[int, ...] = (5, 3), name: str = "labels", seed: int = 0) -> Path:
        generator = np.random.default_rng(seed)
        for shard, count in enumerate(rows):
            table = labelled(generator.normal(size=(count, spec.num_classes)), spec, f"{name}-{shard}")
            write_shard(tmp_path / name, f"shard-{shard}", table, spec, f"{name}-key-{shard}", {"calls": count})
        return tmp_path / name

    return make


@pytest.fixture
def connect() -> Iterator[Callable[..., Any]]:
    """Make clients that are closed at the end."""
    made: list[Any] = []

    def make(*addresses: str, **settings: Any) -> Any:
        made.append(client(*addresses, **settings))
        return made[-1]

    yield make
    for teacher in made:
        teacher.close()


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """An exported torch program with a Linear's weights."""
    layer = torch.nn.Linear(4, CLASSES, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(Linear.weights.T))
    shapes = ({0: torch.export.Dim("rows")},)
    torch.export.save(torch.export.export(layer, (torch.zeros(2, 4),), dynamic_shapes=shapes), tmp_path / "net.pt2")
    return tmp_path / "net.pt2"
