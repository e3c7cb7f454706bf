"""Temperature scaling and the expected calibration error."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import log_softmax

from distilbeam.selection.trust.calibration import expected_calibration_error, fit_temperature


def drawn(rng, size, classes, temperature):
    """Draw labels from softmax(logits) and hand out logits that are `temperature` times too large."""
    logits = rng.normal(size=(size, classes)) * 2
    cumulative = np.exp(log_softmax(logits, axis=1)).cumsum(axis=1)
    return logits * temperature, (rng.random((size, 1)) > cumulative[:, :-1]).sum(axis=1)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_recovers_the_temperature(classes, temperature):
    logits, labels = drawn(np.random.default_rng(0), 40_000, classes, temperature)
    fit = fit_temperature(logits, labels)
    # Four standard errors of log T: its information is the mean variance of the logits under the model.
    probabilities = np.exp(log_softmax(logits / temperature, axis=1))
    scaled = logits / temperature
    variance = ((probabilities * scaled**2).sum(axis=1) - (probabilities * scaled).sum(axis=1) ** 2).mean()
    assert abs(math.log(fit.temperature / temperature)) < 4.5 / math.sqrt(variance * len(labels))
    assert fit.nll_after <= fit.nll_before
    assert fit.ece_after < 0.02
    assert fit.note == ""


def test_closed_form_of_two_classes():
    # Three hundred right of four hundred at a logit of 2: with a = 1/T, 400 (2 sigma(2 a) - 1.5) + (a - 1) = 0.
    fit = fit_temperature([[2.0, 0.0]] * 400, [0, 0, 0, 1] * 100)
    a = brentq(lambda a: 400 * (2 / (1 + math.exp(-2 * a)) - 1.5) + a - 1, 0.1, 10)
    assert fit.temperature == pytest.approx(1 / a, rel=1e-6)
    assert fit.temperature == pytest.approx(2 / math.log(3), rel=0.01)  # the best without the ridge
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert fit.nll_after == pytest.approx(entropy, rel=1e-4)
    assert fit.ece_before == pytest.approx(1 / (1 + math.exp(-2)) - 0.75)
    assert fit.ece_after == pytest.approx(0, abs=2e-3)


def test_temperature_is_a_minimum():
    logits, labels = drawn(np.random.default_rng(1), 500, 4, 2.0)
    fit = fit_temperature(logits, labels)

    def nll(t):
        return -log_softmax(logits / t, axis=1)[np.arange(500), labels].mean()

    def cost(t):
        return 500 * nll(t) + (1 / t - 1) ** 2 / 2

    assert fit.nll_after == pytest.approx(nll(fit.temperature))
    assert cost(fit.temperature) <= min(cost(fit.temperature * 1.01), cost(fit.temperature / 1.01))
    assert fit.nll_before == pytest.approx(nll(1.0))


@pytest.mark.parametrize("size", [20, 200])
@pytest.mark.parametrize("margin", [0.01, 0.3, 3.0, 30.0])
def test_one_error_makes_no_teacher_certain(size, margin):
    # The error is a near tie, which without a ridge costs nothing and makes T as small as it may be.
    logits, labels = np.tile([margin, 0.0], (size, 1)), np.zeros(size, int)
    logits[0], labels[0] = [1e-6, 0.0], 1
    fit = fit_temperature(logits, labels)
    # at the minimum a - 1 is at most the sum of margin e^(-a margin), each at most 1 / (e a)
    assert 1 / fit.temperature <= 0.5 + math.sqrt(0.25 + size / math.e) + 1e-6
    assert fit.temperature <= 1 + 1e-6


def test_twenty_rows_leave_the_temperature_near_one():
    # A calibrated teacher, 20 rows of two classes at a logit of 1: the information of 1/T is 20 p (1 - p) = 3.9, and an estimate
    # that a ridge of 1 shrinks has to first order the deviation sqrt(3.9) / (3.9 + 1) = .40 and no bias.
    rng, inverse = np.random.default_rng(2), []
    right = 1 / (1 + math.exp(-1))
    for _ in range(400):
        labels = (rng.random(20) > right).astype(int)
        if labels.any():
            inverse.append(1 / fit_temperature([[1.0, 0.0]] * 20, labels).temperature)
    information = 20 * right * (1 - right)
    deviation = math.sqrt(information) / (information + 1)
    found = np.array(inverse)
    assert len(found) > 390
    # the spread of 400 draws is known to 4 / sqrt(800), the curvature adds a tenth; without the ridge it is .58
    assert np.std(found) < deviation * 1.1 * (1 + 4 / math.sqrt(800))
    assert abs(found.mean() - 1) < 0.1 + 4 * deviation / math.sqrt(400)


def test_few_labels_are_said():
    logits, labels = drawn(np.random.default_rng(3), 100, 3, 1.0)
    assert fit_temperature(logits, labels).note == ""
    assert fit_temperature(logits[:99], labels[:99]).note == "the temperature rests on only 99 validation labels"


def test_a_teacher_that_is_never_wrong_keeps_its_temperature():
    fit = fit_temperature([[2.0, 0.0], [0.0, 1.0]], [0, 1])
    assert fit.temperature == 1
    assert fit.nll_before == fit.nll_after
    assert fit.note == (
        "the temperature stays 1: the teacher is never wrong on the validation labels; "
        "the temperature rests on only 2 validation labels"
    )


def test_a_useless_teacher_is_made_as_unsure_as_possible():
    fit = fit_temperature([[5.0, 0.0]] * 10, [1] * 10)
    assert fit.temperature == pytest.approx(100, rel=1e-3)
    assert fit.note == "the temperature is at its bound, 100; the temperature rests on only 10 validation labels"
    assert fit.nll_after < fit.nll_before


def test_impossible_truth_costs_a_finite_amount():
    fit = fit_temperature([[0.0, -np.inf], [1.0, 0.0]], [1, 0])
    assert math.isfinite(fit.nll_before)
    assert math.isfinite(fit.nll_after)


def test_calibration_error_by_hand():
    logprobs = np.log([[0.95, 0.05], [0.93, 0.07], [0.6, 0.4], [0.3, 0.7]])
    # Bins of 0.1: {0.95, 0.93} both right, {0.6} wrong, {0.7} right.
    expected = (abs(2 - 1.88) + 0.6 + 0.3) / 4
    assert expected_calibration_error(logprobs, [0, 0, 1, 1], bins=10) == pytest.approx(expected)
    assert expected_calibration_error(logprobs, [0, 0, 1, 1], bins=1) == pytest.approx(abs(3 - 3.18) / 4)
    # Confidences of 0.08 (wrong) and 0.15 (right) are in neighbouring bins and do not cancel.
    many = np.full((2, 20), [[0.92 / 19], [0.85 / 19]])
    many[:, 0] = 0.08, 0.15
    assert expected_calibration_error(np.log(many), [1, 0], bins=10) == pytest.approx((0.08 + 0.85) / 2)
    assert expected_calibration_error([[0.0, -np.inf]], [0]) == 0
    assert expected_calibration_error([[0.0, -np.inf]], [1]) == 1


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"^bins must be at least 1, got 0$"):
        expected_calibration_error([[0.0, 1.0]], [0], bins=0)
    with pytest.raises(ValueError, match=r"^labels must hold at least one validation example, got none$"):
        fit_temperature(np.zeros((0, 2)), [])
    with pytest.raises(ValueError, match=r"^labels must be classes from 0 to 1, got 5$"):
        fit_temperature([[0.0, 1.0]], [5])
