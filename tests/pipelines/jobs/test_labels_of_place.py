"""`to-dataset` of a run, of a labelling job and of a dataset in either: the splits, the user's name of the id, the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from labelling import Command, write_job
from problem import labels_of
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.jobs.labels_of_place import id_of, splits_of


def call(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def written_of(folder: str, split: str) -> pa.Table:
    return pq.read_table(sorted(Path(folder).glob(f"{split}-*.parquet")))


def test_of_a_run_has_what_was_bought_and_what_the_teacher_says_of_the_other_sets(
    problem: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    problem["run"]["rounds"] = 1
    Path("distilbeam.toml").write_text(tomli_w.dumps(problem))
    call("label", "distilbeam.toml", "--round", "0")
    said = call("to-dataset", "run", "--out", "labels")
    assert said.splitlines() == [
        "Wrote labels: train 30, validation 60, test 80 row(s). Next: datasets.load_dataset('labels')"
    ]
    written = pq.read_table(list(Path("labels").glob("train-*.parquet"))).sort_by("pool_row")
    stored = labels_of(tmp_path / "run/labels/round=000")
    assert written["key"].to_pylist() == stored["example_id"].to_pylist()
    best = [max(range(3), key=row.__getitem__) for row in stored["teacher_logprobs"].to_pylist()]
    assert written["label"].to_pylist() == best
    assert written["label_name"].to_pylist() == [str(label) for label in best]
    for split, rows in (("validation", 60), ("test", 80)):
        given, answered = pq.read_table(f"{split}.parquet"), written_of("labels", split)
        by_id = dict(zip(given["key"].to_pylist(), given["x"].to_pylist(), strict=True))
        assert [by_id[key] for key in answered["key"].to_pylist()] == answered["x"].to_pylist()
        assert answered.num_rows == rows
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("labels", cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 30, "validation": 60, "test": 80}
    assert loaded["test"].features["label"].names == ["0", "1", "2"]
    changed = pq.read_table("test.parquet")
    pq.write_table(changed.take(list(range(80))[::-1]), "test.parquet")  # the ids of other rows would be a lie
    call("to-dataset", "run", "--out", "again")
    hashes = written_of("again", "test")["key"].to_pylist()
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in hashes)
    assert written_of("again", "validation")["key"].to_pylist()[0].startswith("3-")
    datasets.load_dataset("again", cache_dir=str(tmp_path / "cache"))
    call("to-dataset", "run/labels/round=000", "--out", "one", "--id", "name", "--prefix", "teacher_")
    one = pq.read_table("one")
    assert one.column_names[:4] == ["name", "teacher_label", "teacher_label_name", "teacher_confidence"]


def test_of_a_labelling_job(command: Command, tmp_path: Path) -> None:
    write_job(tmp_path)
    command("label")
    assert splits_of("job") == {"train": ["job/labels"]}
    assert splits_of("job/labels") == {"train": ["job/labels"]}
    assert id_of("job") == id_of("job/labels") == "key"
    assert "train 240 row(s)" in call("to-dataset", "job", "--out", "out")
    assert pq.read_table("out")["key"].to_pylist()[0].startswith("1-")


def test_a_place_without_labels_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no soft labels: name a dataset, such as run/labels/round=000"):
        splits_of(str(tmp_path))
    assert id_of(str(tmp_path / "a" / "b")) == "example_id"
