"""evaluate and footprint: computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.evaluation.metrics import evaluate, footprint, per_class, worst_classes
from distilbeam.student.networks.build import build_student


def test_four_predictions_by_hand():
    probabilities = np.array([[0.88, 0.12], [0.78, 0.22], [0.32, 0.68], [0.45, 0.55]])
    found = evaluate(np.log(probabilities), np.array([0, 1, 1, 0]), bins=10)
    assert found["examples"] == 4
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(-np.log([0.88, 0.22, 0.68, 0.45]).mean())
    # confidences .88 (right), .78 (wrong), .68 (right), .55 (wrong), each in a bin of its own
    assert found["ece"] == pytest.approx((0.12 + 0.78 + 0.32 + 0.55) / 4)


def test_predictions_in_one_bin_cancel():
    logits = np.log(np.array([[0.75, 0.25]] * 4))
    assert evaluate(logits, np.array([0, 0, 0, 1]), bins=2)["ece"] == pytest.approx(0)
    assert evaluate(logits, np.array([1, 1, 1, 1]), bins=2)["ece"] == pytest.approx(0.75)


def test_logits_need_no_normalisation_and_certainty_is_in_the_last_bin():
    found = evaluate(np.array([[1000.0, 0.0], [3.0, 3.0]]), np.array([0, 0]))
    assert found["nll"] == pytest.approx(np.log(2) / 2)
    assert found["ece"] == pytest.approx(0.25)


def test_agreement_with_the_teacher():
    logits = np.eye(3)
    teacher = np.eye(3)[[0, 1, 0]]
    assert evaluate(logits, np.array([0, 0, 0]), teacher)["agreement"] == pytest.approx(2 / 3)


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match="as many labels as logits, at least one, got 0 and 0"):
        evaluate(np.empty((0, 3)), np.empty(0, np.int64))
    with pytest.raises(ValueError, match="got 2 and 1"):
        evaluate(np.zeros((1, 3)), np.zeros(2, np.int64))


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_that_is_no_class_is_refused(label):
    for judge in (evaluate, lambda logits, labels: per_class(logits, labels, "abc")):
        with pytest.raises(ValueError, match=rf"labels must be classes from 0 to 2, row 1 has {label}"):
            judge(np.eye(3), np.array([0, label, 2]))


def test_the_footprint_of_a_student(tmp_path, student_config):
    network = build_student(student_config, (2,), 3)
    student = load_student(save_student(tmp_path / "s", network, student_config, "abc", (2,)))
    found = footprint(student, repeats=3)
    assert found["parameters"] == sum(p.numel() for p in network.parameters()) == 99
    assert 4 * 99 < found["size_bytes"] < 4 * 99 + 1000
    assert 0 < found["latency_ms_batch1"] < 1000
    assert 0 < found["latency_ms_batch64"] < 1000
    assert found["latency_ms_batch1"] <= found["latency_ms_batch1_p95"]
    assert torch.is_grad_enabled()


def test_rows_that_the_teacher_did_not_answer_do_not_count():
    teacher = np.array([[1.0, 0, 0], [np.nan] * 3, [0, 1.0, 0]])
    assert evaluate(np.eye(3), np.zeros(3, int), teacher)["agreement"] == 0.5
    assert "agreement" not in evaluate(np.eye(3), np.zeros(3, int), np.full((3, 3), np.nan))
    with pytest.raises(ValueError, match="teacher_logprobs must have a row for each of the 3 labels, got 2"):
        evaluate(np.eye(3), np.zeros(3, int), teacher[:2])


def _logits_of(predicted):
    return np.eye(4)[predicted]


def test_classes_one_by_one_by_hand():
    truth = np.array([0, 0, 0, 0, 1, 1])
    found = per_class(_logits_of([0, 0, 1, 3, 1, 0]), truth, "abcd")
    a, b, c, d = found
    assert a == {
        "class": "a",
        "examples": 4,
        "predicted": 3,
        "recall": 0.5,
        "precision": 2 / 3,
        "f1": pytest.approx(4 / 7),
    }
    assert b == {"class": "b", "examples": 2, "predicted": 2, "recall": 0.5, "precision": 0.5, "f1": 0.5}
    assert c == {"class": "c", "examples": 0, "predicted": 0, "recall": None, "precision": None, "f1": None}
    assert d == {"class": "d", "examples": 0, "predicted": 1, "recall": None, "precision": 0.0, "f1": 0.0}
    with pytest.raises(ValueError, match="classes must name the 4 columns of the logits, got 2 names"):
        per_class(np.eye(4), np.arange(4), "ab")


def test_what_the_worst_classes_are_mistaken_for():
    truth = np.array([0] * 5 + [1] * 4 + [2] * 2 + [3])
    predicted = np.array([0, 1, 2, 2, 3, 1, 1, 1, 0, 2, 2, 0])
    found = worst_classes(_logits_of(predicted), truth, "abcd", worst=2, shown=2)
    assert found == [
        {"class": "d", "examples": 1, "recall": 0.0, "mistaken_for": [{"class": "a", "examples": 1}]},
        {
            "class": "a",
            "examples": 5,
            "recall": 0.2,
            "mistaken_for": [{"class": "c", "examples": 2}, {"class": "b", "examples": 1}],
        },
    ]
    assert [row["class"] for row in worst_classes(_logits_of(predicted), truth, "abcd")] == ["d", "a", "b"]
