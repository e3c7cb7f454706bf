"""Soft labels of format 1.0, whose `candidates` are int16, beside those of 1.1, whose are int32."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from distilbeam.inputs.config import InputConfig
from distilbeam.student.data.loader import SoftLabelDataset
from distilbeam.teacher.softlabels import SoftLabelSpec, encode, read_manifest, write_shard

CLASSES = 40_000  # more than int16 holds


def written(directory, version, type_, candidates):
    spec = SoftLabelSpec(CLASSES, kind="top_k", k=2, teacher="t", carried=("x",), version=version)
    logits = np.zeros((len(candidates), CLASSES), np.float32)
    logits[:, -1], logits[:, 7] = 9.0, 8.0  # a class beyond int16, too
    labels = encode(logits, spec)
    batch = pa.record_batch(
        {
            "example_id": pa.array([f"{version}-{i}" for i in range(len(candidates))]),
            "x": pa.array([[1.0, 2.0]] * len(candidates), pa.list_(pa.float32(), 2)),
            **dict(zip(labels.schema.names, labels.columns, strict=True)),
            "candidates": pa.array(candidates, type_),
        }
    )
    write_shard(directory, "shard-0", [batch], spec, "s")
    return directory


@pytest.mark.parametrize("turn", [1, -1])
def test_both_versions_are_read_together_without_overflow(tmp_path, turn):
    former = written(tmp_path / "former", "1.0", pa.int16(), [2, 3, 2**15 - 1])
    today = written(tmp_path / "today", "1.1", pa.int32(), [2**15, 39_999, 40_000])
    assert read_manifest(former).spec.version == "1.0"
    dataset = SoftLabelDataset([former, today][::turn], 4, 0, input=InputConfig(columns=("x",)))
    batches = list(dataset)
    found = np.sort(np.concatenate([batch["candidates"].numpy() for batch in batches]))
    assert found.tolist() == [2, 3, 2**15 - 1, 2**15, 39_999, 40_000]
    assert {int(c) for batch in batches for c in batch["teacher_classes"].flatten()} == {7, CLASSES - 1}
