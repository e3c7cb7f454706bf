"""evaluate and footprint: computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.evaluate import evaluate, footprint
from distilbeam.student.models import build_student


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


def test_the_footprint_of_a_student(tmp_path, student_config):
    network = build_student(student_config, (2,), 3)
    student = load_student(save_student(tmp_path / "s", network, student_config, "abc", (2,)))
    found = footprint(student, repeats=3)
    assert found["parameters"] == sum(p.numel() for p in network.parameters()) == 99
    assert 4 * 99 < found["size_bytes"] < 4 * 99 + 1000
    assert 0 < found["latency_ms_batch1"] < 1000
    assert 0 < found["latency_ms_batch64"] < 1000
    assert torch.is_grad_enabled()
