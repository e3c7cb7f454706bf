"""Debiasing weights: vectors, the proof that they debias, neighbours by brute force, degenerate teachers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from distilbeam.selection.trust.debias import DebiasEstimator, debias_weight, rescale

STUDENT = np.array([0.99, 0.9, 0.6, 0.5, 0.3, 0.1])  # probability of the true class
DISTORTION = np.log1p(-STUDENT) / np.log(STUDENT)


def test_vectors():
    np.testing.assert_allclose(DISTORTION, [458.210577, 21.854345, 1.793745, 1, 0.296248, 0.045757], atol=1e-6)
    expected = [0.010818, 0.193391, 0.863000, 1, 1.163806, 1.235863]
    np.testing.assert_allclose(debias_weight(0.8, DISTORTION), expected, atol=5e-7)
    assert debias_weight(0.9, DISTORTION[1]) == pytest.approx(0.324103, abs=5e-7)
    assert debias_weight(0.5, DISTORTION[5]) == pytest.approx(1.912489, abs=5e-7)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(p=st.floats(0.01, 1), true_loss=st.floats(1e-6, 20), wrong_loss=st.floats(0, 20))
def test_weighted_noisy_loss_is_the_true_loss(p, true_loss, wrong_loss):
    weight = float(debias_weight(p, wrong_loss / true_loss))
    assert weight * (p * true_loss + (1 - p) * wrong_loss) == pytest.approx(true_loss)
    assert 0 < weight <= 1 / p * (1 + 1e-12)


def test_perfect_teacher_or_no_distortion_weigh_one():
    np.testing.assert_array_equal(debias_weight(1.0, [0.0, 7.0]), 1)
    np.testing.assert_array_equal(debias_weight([0.0, 0.3], 1.0), 1)


@pytest.mark.parametrize(
    ("p", "distortion", "message"),
    [
        (1.5, 1, "accuracy must be probabilities from 0 to 1, got 1.5 at index 0"),
        (np.nan, 1, "accuracy must be probabilities from 0 to 1, got nan at index 0"),
        (0.5, -1, "distortion must be finite and at least 0, got -1.0 at index 0"),
        (0.5, [1, np.inf], "distortion must be finite and at least 0, got inf at index 1"),
        (0, 0, "accuracy must be above 0 where the distortion is 0, got 0.0 at index 0"),
    ],
)
def test_bad_weights_are_named(p, distortion, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        debias_weight(p, distortion)


def softmax(logits):
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)


def margins(probabilities):
    top = np.sort(probabilities, axis=1)
    return top[:, -1] - top[:, -2]


def brute_force(student, teacher, labels, new_student, new_teacher, soft):
    """The estimate example by example, with an explicit sort of all distances."""
    count = max(1, round(np.sqrt(len(labels)) / 2))
    f, t = softmax(student), softmax(teacher)
    points = np.stack([margins(f), margins(t)], axis=1)
    loss = -np.log(np.clip(f, 1e-6, 1 - 1e-6))
    weights = []
    for query in np.stack([margins(softmax(new_student)), margins(softmax(new_teacher))], axis=1):
        near = np.argsort(((points - query) ** 2).sum(axis=1), kind="stable")[:count]
        mass, ratios = [], []
        for i in near:
            y = labels[i]
            given = t[i] if soft else np.eye(t.shape[1])[t[i].argmax()]
            wrong = 1 - given[y]
            mass.append(wrong)
            other = np.delete(given, y) @ np.delete(loss[i], y)
            ratios.append(other / wrong / loss[i, y] if wrong > 1e-12 else 0.0)
        mass, ratios = np.array(mass), np.array(ratios)
        if mass.sum() == 0:
            weights.append(1.0)
            continue
        p = max(1 - mass.mean(), 1 / (count + 1))
        weights.append(1 / (1 + (1 - p) * ((mass @ ratios) / mass.sum() - 1)))
    return np.array(weights)


def noisy_models(rng, size, classes):
    labels = rng.integers(classes, size=size)
    truth = np.eye(classes)[labels]
    teacher = truth * rng.choice([-1.0, 2.0], size=(size, 1), p=[0.3, 0.7]) + rng.normal(size=(size, classes))
    student = truth + rng.normal(size=(size, classes))
    return student, teacher - np.log(np.exp(teacher).sum(axis=1, keepdims=True)), labels


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("size", "classes"), [(400, 2), (150, 7), (3, 2), (1, 3)])
def test_weights_against_brute_force(size, classes, soft):
    rng = np.random.default_rng(size)
    student, teacher, labels = noisy_models(rng, size, classes)
    new_student, new_teacher, _ = noisy_models(rng, 60, classes)
    estimator = DebiasEstimator.fit(student, teacher, labels, soft=soft)
    expected = brute_force(student, teacher, labels, new_student, new_teacher, soft)
    np.testing.assert_allclose(estimator.weights(new_student, new_teacher), expected, rtol=1e-9)


def test_hard_labels_are_soft_labels_with_all_their_mass_on_one_class():
    rng = np.random.default_rng(4)
    student, teacher, labels = noisy_models(rng, 200, 4)
    hard = np.where(np.eye(4, dtype=bool)[teacher.argmax(axis=1)], 0.0, -np.inf)
    by_soft = DebiasEstimator.fit(student, hard, labels, soft=True)
    by_hard = DebiasEstimator.fit(student, hard, labels)
    np.testing.assert_array_equal(by_soft.wrong, by_hard.wrong)
    np.testing.assert_allclose(by_soft.weights(student, hard), by_hard.weights(student, hard))


def test_weights_debias_a_teacher_of_known_noise():
    # The teacher is right 8 times of 10 whatever x and its confidence; the student gives the truth 0.9. The exact weight is
    # 0.193391. The teacher's confidences differ by far more than rounding, so that no processor orders neighbours otherwise.
    rng = np.random.default_rng(0)
    size, fitted = 40_000, 10_000
    labels = rng.integers(2, size=size)
    logit = np.log(9) / 2
    student = np.where(labels[:, None] == [0, 1], logit, -logit)
    named = np.where(rng.random(size) < 0.8, labels, 1 - labels)
    confidence = rng.uniform(0.6, 0.9, size=(size, 1))
    teacher = np.log(np.where(named[:, None] == [0, 1], confidence, 1 - confidence))
    estimator = DebiasEstimator.fit(student[:fitted], teacher[:fitted], labels[:fitted])
    weights = estimator.weights(student[fitted:], teacher[fitted:])
    losses = -np.log(np.where(named[fitted:] == labels[fitted:], 0.9, 0.1))

    # K = 50 neighbours count their right ones binomially; the mean of 1 / (p + (1 - p) D) over that count is 0.204734.
    neighbours = estimator.neighbours
    assert neighbours == 50
    right = np.arange(neighbours + 1)
    weight = debias_weight(np.maximum(right / neighbours, 1 / (neighbours + 1)), DISTORTION[1])
    share = binom.pmf(right, neighbours, 0.8)
    mean, deviation = share @ weight, np.sqrt(share @ weight**2 - (share @ weight) ** 2)
    # At least 10,000 / 50 neighbourhoods are independent of each other; losses are independent of weights.
    error = 4 * deviation / np.sqrt(fitted / neighbours)
    assert np.mean(weights) == pytest.approx(mean, abs=error)
    loss, spread = 0.8 * -np.log(0.9) + 0.2 * -np.log(0.1), 0.4 * np.log(9)
    relative = np.hypot(error / mean, 4 * spread / loss / np.sqrt(size - fitted))
    assert np.mean(weights * losses) == pytest.approx(mean * loss, rel=relative)
    assert mean * loss == pytest.approx(-np.log(0.9), rel=0.06)
    assert np.mean(losses) > 4 * -np.log(0.9)


def test_points_in_one_place_decide_together():
    # Everybody is equally unsure: all validation examples are one place, whose error rate is that of all, .2 with 10,000 rows,
    # known to 4 deviations of .004. Any K = 50 of them would give it to .057 only, the same for every query.
    size = 10_000
    labels = np.arange(size) % 2
    student = np.tile([[0.0, 0.0]], (size, 1))
    wrong = np.random.default_rng(10).random(size) < 0.2
    named = np.where(wrong, 1 - labels, labels)
    teacher = np.log(np.where(named[:, None] == [0, 1], 0.8, 0.2))
    rounding = np.random.default_rng(11).integers(-2, 3, (2, size, 2)) * 2.0**-52
    estimator = DebiasEstimator.fit(student + rounding[0], teacher + rounding[1], labels)
    total, _ = estimator._places.sums(np.array([[0.0, 0.6], [0.3, 0.3]]), 50)
    np.testing.assert_allclose(total / 50, wrong.mean(), rtol=1e-9)
    assert abs(wrong.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / size)
    np.testing.assert_allclose(estimator.weights(student[:5], teacher[:5]), 1, rtol=1e-9)  # no distortion at .5


def test_ties_at_the_edge_share_what_is_left():
    # K = 2 of 16: one example at distance 0, four at distance .1 around it, of which one is wrong: 1/4 of the place left.
    points = np.array([[0.5, 0.5], [0.6, 0.5], [0.4, 0.5], [0.5, 0.6], [0.5, 0.4], *[[0.9, 0.9]] * 11])
    wrong = np.array([0.0, 1.0, 0, 0, 0, *[1.0] * 11])
    distortions = np.where(wrong > 0, 3.0, 1.0)
    estimator = DebiasEstimator(points, wrong, distortions)
    assert estimator.neighbours == 2
    total, spread = estimator._places.sums(np.array([[0.5, 0.5]]), 2)
    np.testing.assert_allclose([total[0], spread[0]], [0.25, 0.75])
    for order in (np.arange(16)[::-1], np.random.default_rng(0).permutation(16)):
        moved = DebiasEstimator(points[order], wrong[order], distortions[order])
        np.testing.assert_allclose(moved._places.sums(np.array([[0.5, 0.5]]), 2), [[0.25], [0.75]])


@pytest.mark.parametrize("seed", range(5))
def test_the_last_bits_of_a_processor_change_no_weight(seed):
    rng = np.random.default_rng(seed)
    student, teacher, labels = noisy_models(rng, 300, 3)
    student, teacher = np.round(student), np.repeat(teacher[:10], 30, axis=0)  # many ties
    estimator = DebiasEstimator.fit(student, teacher, labels)
    bits = rng.integers(-3, 4, (4, 300, 3)) * 2.0**-52
    moved = DebiasEstimator.fit(student + bits[0], teacher + bits[1], labels)
    np.testing.assert_allclose(
        moved.weights(student + bits[2], teacher + bits[3]), estimator.weights(student, teacher), rtol=1e-6
    )


def test_perfect_teacher_weighs_one():
    rng = np.random.default_rng(5)
    student, _, labels = noisy_models(rng, 120, 3)
    teacher = np.where(np.eye(3, dtype=bool)[labels], np.log(0.8), np.log(0.1))
    estimator = DebiasEstimator.fit(student, teacher, labels)
    np.testing.assert_array_equal(estimator.weights(student, teacher), 1)
    assert estimator.notes == ("the teacher is never wrong on 120 validation labels",)


def test_teacher_that_is_always_wrong_gives_bounded_weights():
    rng = np.random.default_rng(6)
    labels = rng.integers(2, size=100)
    teacher = np.log(np.where(np.eye(2, dtype=bool)[1 - labels], 0.8, 0.2))
    student = 40.0 * teacher  # agrees with the teacher: wrong and certain
    estimator = DebiasEstimator.fit(student, teacher, labels)
    weights = estimator.weights(student, teacher)
    assert estimator.neighbours == 5
    assert ((weights > 1) & (weights <= 6)).all()


def test_ten_labels():
    rng = np.random.default_rng(7)
    student, teacher, labels = noisy_models(rng, 10, 5)
    estimator = DebiasEstimator.fit(student, teacher, labels)
    weights = estimator.weights(student, teacher)
    assert (np.isfinite(weights) & (weights > 0)).all()
    assert estimator.notes == ("the weights rest on only 10 validation labels",)
    assert estimator.weights(student[:0], teacher[:0]).shape == (0,)


def test_survives_json():
    rng = np.random.default_rng(8)
    student, teacher, labels = noisy_models(rng, 90, 3)
    estimator = DebiasEstimator.fit(student, teacher, labels)
    copy = DebiasEstimator.from_json(json.loads(json.dumps(estimator.to_json())))
    np.testing.assert_array_equal(copy.weights(student, teacher), estimator.weights(student, teacher))
    assert copy.notes == estimator.notes


def test_rescale():
    np.testing.assert_allclose(rescale([1.0, 3.0]), [0.5, 1.5])
    assert rescale([]).shape == (0,)
    with pytest.raises(ValueError, match=r"^weights must be finite and above 0, got 0.0 at index 1$"):
        rescale([1.0, 0.0])


def test_shapes_that_differ_are_named():
    student, teacher, labels = noisy_models(np.random.default_rng(9), 20, 3)
    with pytest.raises(
        ValueError, match=r"^teacher_logprobs must have one entry for each of the 20 entries of student_logits, got 19$"
    ):
        DebiasEstimator.fit(student, teacher[:19], labels)
    with pytest.raises(ValueError, match=r"^teacher_logprobs must have the student's 3 classes, got 2$"):
        DebiasEstimator.fit(student, np.log(np.full((20, 2), 0.5)), labels)
    with pytest.raises(ValueError, match=r"^labels must hold at least one validation example, got none$"):
        DebiasEstimator.fit(student[:0], teacher[:0], labels[:0])
    with pytest.raises(ValueError, match=r"^teacher_logprobs must hold log-probabilities"):
        DebiasEstimator.fit(student, teacher + 1, labels)
