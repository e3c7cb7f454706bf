"""A whole run with a classifier of transformers as its student, chosen for by herding and by margin, from pool to predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from problem import add_texts, labels_of
from tiny_huggingface import DISTILBERT, write_tokenizer

from distilbeam.pipelines.prediction.opened_model import open_model
from distilbeam.pipelines.steps import run

pytest.importorskip("transformers", reason="needs distilbeam[hf]")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of transformers' imports


@pytest.mark.parametrize("method", ["herding", "margin"])
def test_a_run_with_a_huggingface_student(problem: dict[str, Any], tmp_path: Path, method: str) -> None:
    settings = add_texts(tmp_path, problem)
    write_tokenizer(tmp_path / "tokenizer.json")
    inputs = {"kind": "text", "columns": ["text"], "tokenizer": "tokenizer.json", "max_length": 8}
    settings["student"] = {"kind": "huggingface", "config": DISTILBERT, "input": inputs}
    settings["selection"] |= {"method": method, "budget": 80, "compare_uniform": False}
    settings["training"] |= {"epochs": 30, "batch_size": 16, "lr": 1e-2, "precision": "bf16"}
    root = run(settings, base=tmp_path)
    bought = labels_of(root / "labels" / "round=000").num_rows + labels_of(root / "labels" / "round=001").num_rows
    assert bought == 160
    metrics = json.loads((root / "report" / "metrics.json").read_text())
    kept = metrics["students"][metrics["kept"]["round"]]["accuracy"]
    assert kept > 0.45  # a third by chance: of 80 rows as many are right once in 90 times
    _, student = open_model(root)
    test = pq.read_table(tmp_path / "test.parquet")
    predicted = student.predict(test)
    names = [
        name == str(label)
        for name, label in zip(predicted["prediction"].to_pylist(), test["label"].to_pylist(), strict=True)
    ]
    assert sum(names) / len(names) == pytest.approx(kept, abs=0.03)
