"""When a validation set shows a teacher at chance or outputs in another order, and when it must not."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import binom

from distilbeam.selection.trust.class_order import ClassOrder, _assignment


def judged(classes, rows, accuracy, order=None, seed=0):
    """Judge a teacher of an accuracy, whose mistakes are spread evenly and whose output i stands for class order[i]."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, rows)
    meant = np.where(rng.random(rows) < accuracy, truth, (truth + rng.integers(1, classes, rows)) % classes)
    answers = meant if order is None else np.argsort(order)[meant]
    return ClassOrder.judge(answers, truth, classes, rng)


def test_the_assignment_is_the_best_permutation_and_keeps_what_one_row_speaks_against():
    rng = np.random.default_rng(0)
    for _ in range(50):
        answers, truth = rng.integers(0, 4, 30), rng.integers(0, 4, 30)
        score = {
            order: (np.array(order)[answers] == truth).sum() + sum(order[i] == i for i in range(4))
            for order in permutations(range(4))
        }
        assert score[tuple(_assignment(answers, truth, 4).tolist())] == max(score.values())
    assert _assignment(np.array([0, 0, 0]), np.array([1, 0, 0]), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("classes", "rows", "accuracy"), [(12, 300, 1.0), (10, 100, 0.9), (3, 120, 0.85), (1000, 20_000, 0.8)]
)
def test_a_permutation_is_found_and_named(classes, rows, accuracy):
    order = np.roll(np.arange(classes), 1)
    found = judged(classes, rows, accuracy, order)
    assert found.order is not None
    np.testing.assert_array_equal(found.order, order)
    assert abs(found.reordered_accuracy - accuracy) < 4 * np.sqrt(0.25 / rows) + 0.02


def test_two_exchanged_classes_are_found():
    order = np.array([1, 0, *range(2, 10)])
    found = judged(10, 300, 0.85, order)
    assert found.order is not None
    np.testing.assert_array_equal(found.order, order)
    assert not found.at_chance


@pytest.mark.parametrize(
    ("classes", "rows", "accuracy", "most"),
    [
        (10, 30, 0.26, 0.03),
        (10, 60, 0.26, 0.05),
        (10, 100, 0.26, 0.03),
        (10, 300, 0.26, 0.0),
        (150, 300, 0.26, 0.0),
        (2, 100, 0.7, 0.0),
    ],
)
def test_weak_but_honest_teachers_pass(classes, rows, accuracy, most):
    trials = 200
    found = [judged(classes, rows, accuracy, seed=seed) for seed in range(trials)]
    assert sum(one.order is not None for one in found) == 0
    assert (
        sum(one.at_chance for one in found) <= binom.ppf(0.999, trials, most)
        if most
        else not any(o.at_chance for o in found)
    )


def test_a_teacher_that_takes_one_class_for_another_is_not_in_another_order():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 10, 1000)
    answers = np.where((truth == 3) & (rng.random(1000) < 0.9), 7, truth)  # nearly all of class 3 is answered 7
    answers = np.where((truth == 7) & (rng.random(1000) < 0.8), 1, answers)  # and most of 7 is answered 1
    assert ClassOrder.judge(answers, truth, 10, rng).order is None


@pytest.mark.parametrize(("classes", "rows", "least"), [(10, 300, 0.9), (150, 300, 0.9), (3, 300, 0.85)])
def test_teachers_at_chance_are_found(classes, rows, least):
    assert np.mean([judged(classes, rows, 1 / classes, seed=seed).at_chance for seed in range(100)]) >= least


def test_one_answer_for_everything_is_chance_where_rows_tell():
    truth = np.arange(300) % 3
    found = ClassOrder.judge(np.zeros(300, int), truth, 3, np.random.default_rng(0))
    assert found.chance == pytest.approx(1 / 3)
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.at_chance
    few = ClassOrder.judge(np.zeros(12, int), truth[:12], 3, np.random.default_rng(0))
    assert not few.at_chance, "12 rows do not tell it from a weak teacher"


def test_no_rows_say_nothing():
    found = ClassOrder.judge(np.zeros(0, int), np.zeros(0, int), 3, np.random.default_rng(0))
    assert not found.at_chance
    assert found.order is None
