"""Builders that several tests of teachers use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

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
