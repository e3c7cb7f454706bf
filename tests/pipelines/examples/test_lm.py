"""The example of language models, small: text, teacher and pools are written, labelled, learned and measured by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.examples.lm import LENGTH, PARTS, python_texts, write
from distilbeam.progress import Progress
from distilbeam.student.language.evaluate import evaluate_language_model
from distilbeam.student.language.launch import train_file

transformers = pytest.importorskip("transformers", reason="needs distilbeam[hf]")
FEW = 120


def test_every_text_is_there_once_and_in_one_part(tmp_path: Path) -> None:
    write(tmp_path, 0, Progress(), steps=2, documents=FEW)
    parts = {
        name: [json.loads(line)["text"] for line in (tmp_path / "corpus" / f"{name}.jsonl").read_text().splitlines()]
        for name in PARTS
    }
    together = [text for texts in parts.values() for text in texts]
    assert sorted(together) == sorted(list(python_texts())[:FEW])
    assert len(set(together)) == FEW
    told = json.loads((tmp_path / "text.json").read_text())
    assert told["documents"] == {name: len(texts) for name, texts in parts.items()}
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "teacher")) <= 1024


@pytest.mark.slow
def test_the_example_is_labelled_learned_and_measured(tmp_path: Path) -> None:
    write(tmp_path, 0, Progress(), steps=100, documents=FEW)
    tokenizer = ["--format", "lm", "--tokenizer", str(tmp_path / "teacher"), "--sequence-length", str(LENGTH)]
    for name in ("pool", "held-out"):
        source, out = str(tmp_path / "corpus" / f"{name}.jsonl"), str(tmp_path / name)
        done = CliRunner().invoke(app, ["ingest", source, *tokenizer, "--out", out])
        assert done.exit_code == 0, done.output
    for name in ("label", "held-out"):
        done = CliRunner().invoke(app, ["label", str(tmp_path / f"{name}.toml")])
        assert done.exit_code == 0, done.output
    for name in ("student", "plain"):
        train_file(tmp_path / f"{name}.toml", ["training.epochs=3"])
    labels = tmp_path / "held-out-job" / "labels"
    student, plain = (evaluate_language_model(tmp_path / name, labels) for name in ("student", "plain"))
    for found in (student, plain):
        # a model that knows nothing needs the logarithm of its 1,024 ids for each token
        assert 0 < found["nll"] < float(torch.tensor(1024.0).log()) + 0.5
        assert found["continued"].startswith(found["given"])
    assert student["teacher_nll"] == plain["teacher_nll"]
    assert student["kl"] < plain["kl"]  # one has learned the teacher, the other the text
