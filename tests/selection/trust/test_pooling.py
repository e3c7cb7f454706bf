"""Pooled beliefs: the fit against scipy's optimiser, its limits, the product of experts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax

from distilbeam.selection.gains import margin_gain
from distilbeam.selection.trust.calibration import fit_temperature
from distilbeam.selection.trust.pooling import BeliefPool


def problem(n=4_000, classes=4, seed=0):
    """Two independent witnesses of a uniform truth: each sees its one-hot plus Gaussian noise, and knows how much."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, n)
    witnesses = [2.0 * np.eye(classes)[truth] + rng.standard_normal((n, classes)) for _ in range(2)]
    return truth, *(2.0 * seen for seen in witnesses)  # log posterior: seen . e_c * 2 / 1, up to a constant


def test_independent_calibrated_witnesses_multiply():
    truth, teacher, student = problem(60_000)
    found = BeliefPool.fit(teacher, student, truth)
    # The posterior given both is the product. Standard errors from the inverse Hessian are below .02 here; 4 of them
    assert found.teacher + 0.5 * found.doubt == pytest.approx(1, abs=0.08)
    assert found.doubt == pytest.approx(0, abs=0.08)
    assert found.student == pytest.approx(1, abs=0.08)
    both = np.exp(log_softmax(teacher + student, axis=1))
    assert np.abs(np.exp(found.labels(teacher, student)) - both).mean() < 0.01


def test_the_fit_is_the_optimum():
    truth, teacher, student = problem(300, seed=1)
    teacher, student = log_softmax(3 * teacher, axis=1), log_softmax(student, axis=1)
    gain = margin_gain(student)[:, None]
    rows = np.arange(len(truth))

    def cost(w):
        pooled = (w[0] + w[1] * gain) * np.maximum(teacher, -20) + w[2] * np.maximum(student, -20)
        return -log_softmax(pooled, axis=1)[rows, truth].sum() + 0.5 * ((w - [1, 0, 0]) ** 2).sum()

    best = minimize(cost, [1.0, 0.0, 0.0], method="BFGS", options={"gtol": 1e-8})
    found = BeliefPool.fit(teacher, student, truth)
    np.testing.assert_allclose([found.teacher, found.doubt, found.student], best.x, atol=1e-4)


def test_a_student_that_knows_nothing_leaves_temperature_scaling():
    truth, teacher, _ = problem(20_000, seed=2)
    found = BeliefPool.fit(3 * teacher, np.zeros_like(teacher), truth)
    temperature = fit_temperature(3 * teacher, truth).temperature
    assert found.teacher + found.doubt == pytest.approx(
        1 / temperature, rel=0.01
    )  # a student without a clue has gain 1


def test_a_teacher_that_knows_nothing_is_not_believed():
    truth, _, student = problem(20_000, seed=3)
    useless = 3 * np.random.default_rng(4).standard_normal(student.shape)
    found = BeliefPool.fit(useless, student, truth)
    labels = found.labels(useless, student)
    assert (labels.argmax(axis=1) == student.argmax(axis=1)).mean() > 0.97


def test_teacher_is_doubted_where_the_student_is_unsure():
    truth, teacher, student = problem(30_000, seed=5)
    unsure = margin_gain(student) > 0.5
    rng = np.random.default_rng(6)
    teacher[unsure] = 4 * np.eye(4)[rng.integers(0, 4, unsure.sum())]  # says something there, and knows nothing
    assert BeliefPool.fit(teacher, student, truth).doubt < -0.2


def test_impossible_classes_and_hard_labels_stay_finite():
    hard = np.where(np.eye(3, dtype=bool)[[0, 1, 2, 0]], 0.0, -np.inf)
    found = BeliefPool.fit(hard, np.zeros((4, 3)), [0, 1, 2, 1])
    assert np.isfinite(found.labels(hard, np.zeros((4, 3)))).all()


def test_json():
    pool = BeliefPool(0.9, -0.2, 0.4)
    assert BeliefPool.from_json(json.loads(json.dumps(pool.to_json()))) == pool


def test_refusals():
    with pytest.raises(ValueError, match=r"^student_logits must have the teacher's 3 classes, got 2$"):
        BeliefPool.fit(np.zeros((2, 3)), np.zeros((2, 2)), [0, 1])
    with pytest.raises(ValueError, match=r"^labels must hold at least one validation example, got none$"):
        BeliefPool.fit(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros(0, int))
