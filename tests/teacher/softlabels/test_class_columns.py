"""Soft labels as Hugging Face datasets reads them: classes with names, the user's id, the stored numbers beside them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilbeam.teacher.softlabels import SoftLabelSpec, decode, to_dataset, with_classes, write_dataset, write_shard

datasets = pytest.importorskip("datasets", reason="datasets is not installed")
Labelled = Callable[..., pa.Table]

NAMES = ("[pos]", "ä b", "no", "yes")
LOGITS = np.log([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
SPECS = {
    "dense": SoftLabelSpec(4, classes=NAMES),
    "float16": SoftLabelSpec(4, classes=NAMES, storage="float16"),
    "top_k": SoftLabelSpec(4, "top_k", 2, classes=NAMES),
}


@pytest.fixture(params=SPECS)
def labels(request: pytest.FixtureRequest, tmp_path: Path, labelled: Labelled) -> tuple[Path, pa.Table, SoftLabelSpec]:
    spec = SPECS[request.param]
    table = labelled(LOGITS, spec)
    write_shard(tmp_path / "labels", "a", table.slice(0, 2), spec, "a")
    write_shard(tmp_path / "labels", "b", table.slice(2), spec, "b")
    return tmp_path / "labels", table, spec


def check(found: datasets.Dataset, table: pa.Table) -> None:
    assert found.column_names[:4] == ["row_name", "label", "label_name", "confidence"]
    assert found.features["label"] == datasets.ClassLabel(names=list(NAMES))
    assert found["row_name"][:] == table["example_id"].to_pylist()
    assert found["label"][:] == [3, 0, 0]  # of equal ones the first that is stored
    assert found["label_name"][:] == ["yes", "[pos]", "[pos]"]
    assert found.features["label"].int2str(found["label"][:]) == found["label_name"][:]
    np.testing.assert_allclose(found["confidence"][:], [0.4, 0.7, 0.25], atol=3e-4)  # rounded to half precision
    assert found["teacher_logprobs"][:] == table["teacher_logprobs"].to_pylist()
    assert found["teacher_margin"][:] == table["teacher_margin"].to_pylist()


def test_in_memory(labels: tuple[Path, pa.Table, SoftLabelSpec]) -> None:
    path, table, _spec = labels
    found = to_dataset(path, id_column="row_name")
    assert list(found) == ["train"]
    check(found["train"], table)
    both = to_dataset({"train": [path], "test": [path, path]}, id_column="row_name")
    assert {split: len(rows) for split, rows in both.items()} == {"train": 3, "test": 6}


def test_as_files(labels: tuple[Path, pa.Table, SoftLabelSpec], tmp_path: Path) -> None:
    path, table, spec = labels
    assert write_dataset({"train": [path], "test": [path]}, tmp_path / "out", "row_name") == {"train": 3, "test": 3}
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == [f"{split}-{i:05d}-of-00002.parquet" for split in ("test", "train") for i in range(2)]
    cache = str(tmp_path / "cache")
    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=cache)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 3, "test": 3}
    check(found["train"], table)
    files = str(tmp_path / "out/train-*.parquet")
    check(datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache), table)
    read = pq.read_table(
        tmp_path / "out/train-00000-of-00002.parquet"
    )  # still soft labels, of a specification that says so
    np.testing.assert_array_equal(decode(read, spec).logprobs, decode(table.slice(0, 2), spec).logprobs)
    assert SoftLabelSpec.from_json(read.schema.metadata[b"distilbeam.softlabels"]).classes == NAMES


def test_classes_without_names_are_their_numbers(labelled: Labelled) -> None:
    spec = SoftLabelSpec(4)
    table = with_classes(labelled(LOGITS, spec), spec)
    assert table["label_name"].to_pylist() == ["3", "0", "0"]
    metadata = json.loads(table.schema.metadata[b"huggingface"])
    assert metadata["info"]["features"]["label"]["names"] == ["0", "1", "2", "3"]


def test_draws_have_the_most_frequent_class(labelled: Labelled) -> None:
    spec = SoftLabelSpec(4, "sampled", 64)
    table = labelled(LOGITS[:2], spec)
    found = with_classes(table, spec)
    counts = decode(table, spec).dense(4)
    assert found["label"].to_pylist() == counts.argmax(axis=1).tolist()
    np.testing.assert_allclose(found["confidence"].to_numpy(), np.exp(counts.max(axis=1)), rtol=1e-6)


def test_a_column_is_not_replaced(labelled: Labelled, tmp_path: Path) -> None:
    spec = SoftLabelSpec(4, carried=("label",))
    table = labelled(LOGITS, spec).append_column("label", pa.array(["mine"] * 3))
    with pytest.raises(ValueError, match=r"the labels carry a column label themselves.*the prefix 'teacher_'"):
        with_classes(table, spec)
    found = with_classes(table, spec, prefix="teacher_")
    assert found["label"].to_pylist() == ["mine"] * 3
    assert found["teacher_label"].to_pylist() == [3, 0, 0]
    write_shard(tmp_path / "labels", "a", table, spec, "a")
    with pytest.raises(ValueError, match="carry a column label"):
        write_dataset({"train": [tmp_path / "labels"]}, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["labels"]
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out is there already; name another folder or remove it"):
        write_dataset({"train": [tmp_path / "labels"]}, tmp_path / "out", prefix="teacher_")


def test_labels_of_tokens_have_no_class_of_a_row() -> None:
    spec = SoftLabelSpec(1000, "top_k", 8, unit="token", sequence_length=256, tokenizer="ab")
    with pytest.raises(ValueError, match="holds labels of tokens"):
        with_classes(pa.table({"example_id": ["a"]}), spec)
