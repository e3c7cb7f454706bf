"""A manifest may come from anybody: it leads to files of its own dataset, and nothing else is read or removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from distilbeam.teacher.softlabels import (
    SoftLabelSpec,
    committed,
    encode,
    merge_manifests,
    read_manifest,
    remove_shards,
    write_shard,
)
from distilbeam.teacher.softlabels.placing import placed_entry
from distilbeam.teacher.softlabels.verify import verify_labels

SPEC = SoftLabelSpec(num_classes=2)


def make_dataset(folder: Path, name: str = "s") -> Path:
    labels = encode(np.zeros((3, 2), np.float32), SPEC)
    columns = dict(zip(labels.schema.names, labels.columns, strict=True))
    write_shard(folder, name, pa.table({"example_id": [f"{name}{i}" for i in range(3)], **columns}), SPEC, name)
    return folder


def change(folder: Path, name: str = "s", /, **fields: Any) -> None:
    file = folder / "_manifest" / f"{name}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "labels")


@pytest.mark.parametrize("absolute", [False, True])
def test_a_file_outside_is_neither_read_nor_removed(dataset: Path, tmp_path: Path, absolute: bool) -> None:
    outside = tmp_path / "outside.parquet"
    (dataset / "s.parquet").rename(outside)
    change(dataset, path=str(outside) if absolute else "../outside.parquet")
    expected = (
        r"path must be relative" if absolute else r"leads to '../outside.parquet', which is not a file of the dataset"
    )
    for read in (read_manifest, verify_labels):
        with pytest.raises(ValueError, match=expected):
            read(dataset)
    if absolute:
        with pytest.raises(ValueError, match=expected):
            remove_shards(dataset, {"s"})
    else:
        remove_shards(dataset, {"s"})
        assert committed(dataset) == set()
    assert outside.exists()


@pytest.mark.parametrize("folder", [False, True])
def test_a_link_is_not_followed(dataset: Path, tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "elsewhere" / "s.parquet"
    target.parent.mkdir()
    (dataset / "s.parquet").rename(target)
    link = dataset / ("in" if folder else "s.parquet")
    link.symlink_to(target.parent if folder else target)
    if folder:
        change(dataset, path="in/s.parquet")
    with pytest.raises(ValueError, match="not a file of the dataset itself"):
        read_manifest(dataset)
    remove_shards(dataset, {"s"})
    assert target.exists()


@pytest.mark.parametrize("path", ["", ".", "/", "C:\\x.parquet", "\\\\host\\x", "s3://bucket/x", "a\0b", "x/../../y"])
def test_other_paths_are_refused(dataset: Path, path: str) -> None:
    change(dataset, path=path)
    with pytest.raises(ValueError, match=r"path must be relative to the dataset|not a file of the dataset itself"):
        read_manifest(dataset)


@pytest.mark.parametrize("key", ["../x", "a/b", "", ".x"])
def test_a_key_names_a_file(dataset: Path, key: str) -> None:
    change(dataset, key=key)
    with pytest.raises(ValueError, match="key must be letters, digits"):
        read_manifest(dataset)


def test_a_placed_shard_is_the_datasets_own(dataset: Path, tmp_path: Path) -> None:
    entry = dataset / "_manifest" / "s.json"
    entry.rename(entry.with_suffix(".placed"))
    assert placed_entry(dataset, "s") is not None
    (dataset / "s.parquet").rename(tmp_path / "s.parquet")
    placed = entry.with_suffix(".placed")
    placed.write_text(json.dumps({**json.loads(placed.read_text()), "path": "../s.parquet"}))
    assert placed_entry(dataset, "s") is None


def test_a_merged_dataset_leads_to_what_its_sources_list(tmp_path: Path) -> None:
    sources = [make_dataset(tmp_path / name, name) for name in ("a", "b")]
    merged = merge_manifests(tmp_path / "all", sources)
    assert merged.rows == 6
    assert verify_labels(tmp_path / "all").ok
    remove_shards(tmp_path / "all", {"a"})
    assert (sources[0] / "a.parquet").exists(), "the file is the source's"
    change(sources[1], "b", checksum="sha256:0")
    with pytest.raises(ValueError, match=r"leads to '../b/b.parquet'"):
        read_manifest(tmp_path / "all")
