"""Model cards: what a student's and an export's README says, beside figures that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.evaluation.metrics import evaluate, per_class
from distilbeam.student.export.export import card_of, export_student
from distilbeam.student.model_card import MOST_CLASSES, Card
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig

METRICS = {"epochs": 30, "best_epoch": 20, "soft_rows": 1200, "hard_rows": 60, "validation_accuracy": 0.875}


@pytest.fixture
def folder(tmp_path):
    config = StudentConfig(kind="mlp", hidden=(4,), input={"columns": ["x"], "scale": 0.5, "mean": [1.0]})
    torch.manual_seed(0)
    extra = {"metrics": METRICS, "seed": 7, "training": {"objective": "distill", "lr": 0.003}}
    return save_student(tmp_path / "s", build_student(config, (2,), 3), config, ("a|b", "c", "d"), (2,), extra)


def test_a_student_has_a_card_from_the_beginning(folder):
    card = (folder / "README.md").read_text()
    assert "| labels of the teacher that it learned | 1,200 |" in card
    assert "| human labels that it learned | 60 |" in card
    assert "20 of 30 epochs, objective distill, learning rate 0.003, seed 7" in card
    assert "87.5%" in card
    assert "a\\|b, c, d" in card
    assert f"{load_student(folder).num_parameters:,} parameters" in card
    assert 'load_student("FOLDER").predict({"x": [...]})' in card
    assert "Nothing has been measured" in card
    for section in ("## Data and labels", "## Figures", "## Intended use", "## How to call it"):
        assert section in card


def test_an_export_says_what_its_file_takes(folder, tmp_path):
    provenance = {"soft_labels": {"spec": {"teacher": "torch:t.pt2:abc", "temperature": 1.25}}}
    export = export_student(folder, "onnx", tmp_path / "e", provenance=provenance)
    card = (export / "README.md").read_text()
    assert "`model.onnx` takes `input`, float32 [batch, 2], and gives `logits` [batch, 3]." in card
    assert "In the graph: numbers: (x * 0.5 - [1.0]) / 1." in card
    assert "| teacher | torch:t.pt2:abc, labels at temperature 1.25 |" in card
    assert "reader.py < rows.jsonl" in card
    assert "`reader.py` in this folder (`pip install numpy onnxruntime`)" in card
    assert f"| fingerprint of the student | {load_student(folder).fingerprint()} |" in card


def test_figures_by_class_the_lowest_recall_first(folder):
    student = load_student(folder)
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, 3)), rng.integers(0, 2, 40)
    classes = per_class(logits, labels, student.classes)
    figures = evaluate(logits, labels, logits)
    text = replace(card_of(student), figures={"test": figures}, per_class=classes, on="the test set").text()
    accuracy = (logits.argmax(axis=1) == labels).mean()
    assert f"| test | 40 | {accuracy:.1%} |" in text
    assert "| 100.0% |" in text  # the agreement with itself
    table = text[text.index("By class on the test set") :]
    recalls = {c["class"]: c["recall"] for c in classes if c["examples"]}
    order = sorted(recalls, key=recalls.__getitem__)
    assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[4:6]] == [
        n.replace("|", "\\|") for n in order
    ]
    assert "| d |" not in table  # of which there was no example


def test_a_long_list_of_classes_is_cut():
    names = [f"c{i}" for i in range(300)]
    rows = [{"class": n, "examples": 1, "recall": 1.0, "precision": None, "f1": 1.0} for n in names]
    config = StudentConfig(kind="mlp", input={"columns": ["x"]})
    figures = {"test": {"examples": 300, "accuracy": 1.0, "nll": 0.0, "ece": 0.0}}
    text = Card(config, names, 5, figures=figures, per_class=rows, on="the test set").text()
    assert "and 280 more" in text
    assert text.count("| 100.0% |  | 100.0% |") == MOST_CLASSES
