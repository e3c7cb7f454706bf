"""Student-Label Mixing's estimates and the number of wrong labels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

from distilbeam.selection.trust.noise import TeacherNoise, teacher_errors

MARGINS = np.arange(1, 7) / 10
RIGHT = np.array([0, 1, 0, 1, 1, 1])


def pool_adjacent_violators(outcomes):
    """Isotonic regression by hand: merge neighbouring blocks until their means do not fall."""
    blocks = []
    for value in outcomes:
        blocks.append([float(value), 1])
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    return np.concatenate([[mean] * size for mean, size in blocks])


@pytest.mark.parametrize(("floor", "expected"), [(0.0, [0, 0.5, 0.5, 1, 1, 1]), (0.6, [0.6, 0.6, 0.6, 1, 1, 1])])
def test_accuracy_vector(log_odds, floor, expected):
    noise = TeacherNoise.fit(log_odds(MARGINS), 1 - RIGHT, floor=floor)
    np.testing.assert_allclose(noise.accuracy(log_odds(MARGINS)), expected)


def test_accuracy_between_and_beyond_the_margins_seen(log_odds):
    noise = TeacherNoise.fit(log_odds(MARGINS), 1 - RIGHT, floor=0.0)
    np.testing.assert_allclose(noise.accuracy(log_odds([0.0, 0.15, 0.35, 0.99])), [0, 0.25, 0.75, 1], atol=1e-12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(outcomes=st.lists(st.booleans(), min_size=1, max_size=40), floor=st.floats(0, 1))
def test_accuracy_is_isotonic_regression(log_odds, outcomes, floor):
    margins = np.linspace(0.05, 0.95, len(outcomes))
    noise = TeacherNoise.fit(log_odds(margins), 1 - np.array(outcomes, int), floor=floor)
    expected = np.maximum(pool_adjacent_violators(outcomes), floor)
    np.testing.assert_allclose(noise.accuracy(log_odds(margins)), expected, atol=1e-9)


def many_class_teacher(rng, size, classes=5):
    """Draw truth from the teacher's own probabilities, so that every estimate has a known target."""
    logits = rng.normal(size=(size, classes)) * rng.choice([0.3, 1.0, 4.0], size=(size, 1))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    truth = (rng.random((size, 1)) > np.exp(logprobs).cumsum(axis=1)[:, :-1]).sum(axis=1)
    return logprobs, truth


def test_candidates_cover_the_truth_as_often_as_asked():
    rng = np.random.default_rng(0)
    noise = TeacherNoise.fit(*many_class_teacher(rng, 20_000), coverage=0.9)
    logprobs, truth = many_class_teacher(rng, 20_000)
    sizes = noise.candidates(logprobs)
    assert sizes.dtype == np.int64
    assert set(sizes) <= set(range(2, 6))
    assert len(set(sizes)) > 2
    ranks = (np.argsort(-logprobs, axis=1) == truth[:, None]).argmax(axis=1)
    assert (ranks < sizes).mean() > 0.9
    # No smaller number would do: where m > 2, m - 1 classes hold the truth less often than asked for.
    larger = sizes > 2
    assert (ranks < sizes - 1)[larger].mean() < 0.9


def test_candidates_are_the_smallest_number_that_reaches_the_coverage():
    rng = np.random.default_rng(1)
    logprobs, truth = many_class_teacher(rng, 400)
    noise = TeacherNoise.fit(logprobs, truth, coverage=0.8)
    top = np.sort(np.exp(logprobs), axis=1)
    order = np.argsort(top[:, -1] - top[:, -2], kind="stable")
    ranks = (np.argsort(-logprobs, axis=1) == truth[:, None]).argmax(axis=1)
    expected = np.full(400, 5)
    for size in (4, 3, 2):
        covered = pool_adjacent_violators(ranks[order] < size) >= 0.8 - 1e-12
        expected[order[covered]] = size
    np.testing.assert_array_equal(noise.candidates(logprobs), expected)


def test_two_classes_have_two_candidates(log_odds):
    noise = TeacherNoise.fit(log_odds(MARGINS), 1 - RIGHT)
    assert noise.candidates(log_odds([0.0, 0.5, 1 - 1e-9])).tolist() == [2, 2, 2]


def test_full_coverage_of_an_unreliable_teacher_takes_all_classes():
    logprobs = np.log(np.tile([0.5, 0.3, 0.15, 0.05], (40, 1)))
    noise = TeacherNoise.fit(logprobs, np.arange(40) % 4, coverage=1.0)
    assert (noise.candidates(logprobs) == 4).all()
    np.testing.assert_allclose(noise.accuracy(logprobs), 0.5)  # a quarter is right: the floor


def test_hard_labels_are_soft_labels_with_one_finite_entry():
    hard = np.where(np.eye(3, dtype=bool)[[0, 1, 2, 0]], 0.0, -np.inf)
    noise = TeacherNoise.fit(hard, [0, 1, 2, 1], floor=0.0)
    np.testing.assert_allclose(noise.accuracy(hard), 0.75)


def test_survives_json():
    rng = np.random.default_rng(2)
    logprobs, truth = many_class_teacher(rng, 300)
    for noise in (TeacherNoise.fit(logprobs, truth), TeacherNoise.fit(logprobs[:5], truth[:5], coverage=1.0)):
        copy = TeacherNoise.from_json(json.loads(json.dumps(noise.to_json())))
        assert copy == noise
        np.testing.assert_array_equal(copy.accuracy(logprobs), noise.accuracy(logprobs))
        np.testing.assert_array_equal(copy.candidates(logprobs), noise.candidates(logprobs))


def test_perfect_teacher(log_odds):
    noise = TeacherNoise.fit(log_odds(np.linspace(0.1, 0.9, 200)), np.zeros(200, int))
    np.testing.assert_allclose(noise.accuracy(log_odds([0.0, 0.5])), 1)
    assert noise.notes == (
        "the teacher is never wrong on 200 validation labels, so its accuracy is taken as 1",
        "1 of 2 classes have no validation label (1); they share the fit",
    )


def test_useless_teacher(log_odds):
    noise = TeacherNoise.fit(log_odds(np.linspace(0.1, 0.9, 200)), np.arange(200) % 2)
    np.testing.assert_allclose(noise.accuracy(log_odds([0.0, 0.5])), 0.5, atol=0.01)
    worse = TeacherNoise.fit(log_odds(np.linspace(0.1, 0.9, 200)), np.ones(200, int))
    np.testing.assert_allclose(worse.accuracy(log_odds([0.0, 0.9])), 0.5)
    assert worse.notes[0] == (
        "the accuracy is the floor of 0.5 everywhere: no margin makes the teacher better than that"
    )


def test_ten_labels_and_classes_never_seen():
    rng = np.random.default_rng(3)
    logprobs, truth = many_class_teacher(rng, 10, classes=12)
    noise = TeacherNoise.fit(logprobs, truth % 3)
    assert ((noise.accuracy(logprobs) >= 0.5) & (noise.accuracy(logprobs) <= 1)).all()
    assert noise.notes[-2:] == (
        "the fit rests on only 10 validation labels",
        "9 of 12 classes have no validation label (3, 4, 5, 6, 7, ...); they share the fit",
    )


def test_one_label(log_odds):
    noise = TeacherNoise.fit(log_odds([0.4]), [0])
    assert noise.accuracy(log_odds([0.1])).tolist() == [1.0]


def test_errors_of_a_pool(log_odds):
    labels = (np.arange(100) < 20).astype(int)
    estimate = teacher_errors(log_odds(np.full(100, 0.5)), labels, pool=5_000)
    assert estimate.wrong == pytest.approx(1_000)
    assert estimate.standard_error == pytest.approx(5_000 * math.sqrt(0.2 * 0.8 / 100))
    assert estimate.rate == pytest.approx(0.2)
    assert estimate.note == ""


def test_standard_error_covers(log_odds):
    # The error count of 400 labels is binomial; k +- 3 standard errors must cover the truth as often as computed exactly.
    rate, labels, pool = 0.15, 400, 10_000
    errors = np.arange(labels + 1)
    estimates = [
        teacher_errors(log_odds(np.full(labels, 0.5)), (np.arange(labels) < count).astype(int), pool)
        for count in errors[1:-1]
    ]
    covers = [abs(e.wrong - rate * pool) <= 3 * e.standard_error for e in estimates]
    assert binom.pmf(errors[1:-1], labels, rate)[covers].sum() > 0.995


@pytest.mark.parametrize(("label", "always", "rate"), [(0, "never wrong", 0.0), (1, "always wrong", 1.0)])
def test_errors_of_a_teacher_at_the_edge(log_odds, label, always, rate):
    estimate = teacher_errors(log_odds(np.full(50, 0.5)), np.full(50, label), pool=1_000)
    jeffreys = beta(50 * rate + 0.5, 50 * (1 - rate) + 0.5).std()
    assert estimate.wrong == 1_000 * rate
    assert estimate.standard_error == pytest.approx(1_000 * jeffreys)
    assert estimate.note == f"the standard error is that of Jeffreys' prior: the teacher is {always} on 50 labels"


GOOD = np.log([[0.5, 0.5], [0.9, 0.1]])


@pytest.mark.parametrize(
    ("logprobs", "labels", "options", "message"),
    [
        (
            [[0.0, 0.0]],
            [0],
            {},
            "teacher_logprobs must hold log-probabilities, whose exponentials sum to 1 in each row, got ",
        ),
        (GOOD, [0], {}, r"labels must have one entry for each of the 2 examples, got shape \(1,\)"),
        (GOOD, [0, 2], {}, "labels must be classes from 0 to 1, got 2"),
        (GOOD, [0, -1], {}, "labels must be classes from 0 to 1, got -1"),
        (GOOD, [0.0, 1.0], {}, r"labels must be whole numbers \(class indices\), got dtype float64"),
        (np.zeros((0, 2)), [], {}, "labels must hold at least one validation example, got none"),
        (GOOD, [0, 1], {"floor": 1.5}, "floor must be between 0 and 1, got 1.5"),
        (GOOD, [0, 1], {"coverage": 0}, "coverage must be above 0, got 0"),
        (GOOD, [0, 1], {"coverage": 2}, "coverage must be between 0 and 1, got 2"),
    ],
)
def test_bad_input_is_named(logprobs, labels, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TeacherNoise.fit(logprobs, labels, **options)


def test_other_classes_than_the_fits_are_named():
    noise = TeacherNoise.fit(GOOD, [0, 1])
    with pytest.raises(ValueError, match=r"^teacher_logprobs must have the 2 classes of the fit, got 3$"):
        noise.accuracy(np.log([[0.2, 0.3, 0.5]]))
    with pytest.raises(ValueError, match=r"^pool must be a number of examples, at least 0, got -1$"):
        teacher_errors(GOOD, [0, 1], -1)
