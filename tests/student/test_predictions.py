"""Predictions of a table: the classes that the logits say, and a reason for each row that has none."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.export.export import export_student
from distilbeam.student.export.load import load_export
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.predictions import NAMES, require_free

CLASSES = ("red", "green", "blue")


@pytest.fixture
def student(tmp_path, student_config):
    torch.manual_seed(0)
    network = build_student(student_config, (2,), 3)
    return load_student(save_student(tmp_path / "student", network, student_config, CLASSES, (2,)))


def by_hand(logits):
    """Classes and probabilities, the most probable first, of one row at a time."""
    order = [sorted(range(len(row)), key=lambda c, row=row: (-row[c], c)) for row in logits]
    exponentials = np.exp(np.asarray(logits, np.float64))
    return order, exponentials / exponentials.sum(axis=1, keepdims=True)


def test_classes_and_probabilities_are_those_of_the_logits(student, problem):
    table = problem(300, 1).table()
    found = student.predict(table, top_k=2, logits=True, batch_rows=77)
    logits = student.logits(table.combine_chunks().to_batches()[0])
    order, probabilities = by_hand(logits)
    assert found.column_names == list(NAMES)
    assert found["prediction"].to_pylist() == [CLASSES[row[0]] for row in order]
    assert len(set(found["prediction"].to_pylist())) > 1
    np.testing.assert_allclose(found["confidence"].to_numpy(), probabilities.max(axis=1), rtol=1e-5)
    assert found["top_classes"].to_pylist() == [[CLASSES[row[0]], CLASSES[row[1]]] for row in order]
    expected = [[probabilities[i, c] for c in row[:2]] for i, row in enumerate(order)]
    np.testing.assert_allclose(np.array(found["top_probabilities"].to_pylist()), expected, rtol=1e-5)
    np.testing.assert_allclose(np.array(found["logits"].to_pylist()), logits, rtol=1e-5, atol=1e-6)
    assert found["reason"].null_count == 300


def test_a_row_without_a_usable_input_has_a_reason_and_costs_its_neighbours_nothing(student):
    rows = [[0.5, -1.0], None, [float("nan"), 1.0], [1.0], [2.0, 3.0], [1e30, 0.0]]
    found = student.predict(pa.table({"x": pa.array(rows, pa.list_(pa.float64()))}), top_k=3, logits=True)
    alone = student.predict({"x": [rows[0], rows[4]]}, top_k=3, logits=True)
    assert found.take([0, 4]).drop_columns("logits").equals(alone.drop_columns("logits"))
    missing = found.take([1, 2, 3, 5])
    for name in NAMES[:-1]:
        assert missing[name].null_count == 4
    reasons = missing["reason"].to_pylist()
    assert "missing" in reasons[0]
    assert reasons[1] == "number 1 of its input is nan, which is not a finite number"
    assert "[1]" in reasons[2]
    assert "[2]" in reasons[2]
    assert "too large" in reasons[3]


def test_a_student_of_weights_that_are_no_numbers_says_so_for_each_row(student):
    next(student.module.parameters()).fill_(float("nan"))
    found = student.predict({"x": [[1.0, 2.0]]})
    assert found.to_pylist() == [
        {"prediction": None, "confidence": None, "reason": "the student's logits of it are not finite numbers"}
    ]


def test_ties_go_to_the_first_class_as_argmax_does(tmp_path):
    config = StudentConfig(kind="mlp", hidden=(), input={"columns": ["x"]})
    network = build_student(config, (2,), 3)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    found = load_student(save_student(tmp_path / "s", network, config, CLASSES, (2,))).predict([[1.0, 2.0]], top_k=9)
    assert found["top_classes"].to_pylist() == [["red", "green", "blue"]]
    np.testing.assert_allclose(found["top_probabilities"].to_pylist(), [[1 / 3] * 3], rtol=1e-6)


def test_what_arrow_makes_a_table_of_is_one(student):
    x = [[0.5, -1.0], [2.0, 3.0]]
    expected = student.predict(pa.table({"x": x}))
    for data in (pa.record_batch({"x": x}), {"x": x}, [{"x": row} for row in x], x, pa.table({"x": x}).to_pandas()):
        assert student.predict(data).equals(expected)


def test_no_rows_have_no_predictions_and_the_same_columns(student):
    some, none = student.predict([[1.0, 2.0]], top_k=2, logits=True), student.predict([], top_k=2, logits=True)
    assert none.num_rows == 0
    assert none.schema == some.schema


def test_an_export_predicts_what_its_student_does(student, tmp_path, problem):
    table = problem(40, 3).table()
    expected = student.predict(table, top_k=3)
    export = load_export(export_student(tmp_path / "student", "pt2", tmp_path / "pt2"), threads=1)
    found = export.predict(table, top_k=3)
    assert found["top_classes"].equals(expected["top_classes"])
    np.testing.assert_allclose(found["confidence"].to_numpy(), expected["confidence"].to_numpy(), rtol=1e-4)


def test_what_cannot_be_predicted_is_refused_in_a_sentence(student):
    with pytest.raises(ValueError, match=r"must have the column\(s\) x that the student reads; they have y"):
        student.predict({"y": [1]})
    with pytest.raises(ValueError, match=r"must be a table with the columns x, .* got str"):
        student.predict("x")
    with pytest.raises(ValueError, match="Arrow makes none of them"):
        student.predict({"x": [1, "a"]})
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        student.predict([[1.0, 2.0]], top_k=0)
    with pytest.raises(ValueError, match="batch_rows must be at least 1, got 0"):
        student.predict([[1.0, 2.0]], batch_rows=0)
    with pytest.raises(ValueError, match="other names than those of the predictions, got reason; rename"):
        require_free(["id", "reason"])
