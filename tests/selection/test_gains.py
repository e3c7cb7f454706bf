"""Gains from logits: values by hand, in high precision, and where a softmax saturates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilbeam.selection.gains import entropy_gain, least_confidence_gain, margin_gain

GAINS = [margin_gain, entropy_gain, least_confidence_gain]


def test_values_by_hand():
    logits = np.log([[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_allclose(margin_gain(logits), [0.8, 1.0])
    np.testing.assert_allclose(least_confidence_gain(logits), [0.5, 2 / 3])
    np.testing.assert_allclose(entropy_gain(logits), [-sum(p * math.log(p) for p in (0.5, 0.3, 0.2)), math.log(3)])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(logits=st.lists(st.floats(-30, 30), min_size=2, max_size=8), shift=st.floats(-1e4, 1e4))
def test_against_a_softmax_in_extended_sums(logits, shift):
    top = max(logits)
    weights = [math.exp(z - top) for z in logits]
    total = math.fsum(weights)
    first, second, *_ = sorted((w / total for w in weights), reverse=True)
    shifted = np.array([logits]) + shift
    rounding = 1e-14 + 1e-15 * abs(shift)
    assert margin_gain(shifted)[0] == pytest.approx(1 - first + second, abs=rounding, rel=1e-10)
    assert least_confidence_gain(shifted)[0] == pytest.approx(1 - first, abs=rounding, rel=1e-10)
    entropy = -math.fsum(w / total * math.log(w / total) for w in weights)
    assert entropy_gain(shifted)[0] == pytest.approx(entropy, abs=40 * rounding, rel=1e-10)


@pytest.mark.parametrize("gain", GAINS)
def test_confident_students_still_tell_examples_apart(gain):
    # 1 - softmax is 0 in float64 beyond a difference of 37.
    logits = np.array([[gap, 0.0, 0.0] for gap in (30.0, 40.0, 60.0, 120.0, 700.0)], np.float32)
    gains = gain(logits)
    assert (gains > 0).all()
    assert (np.diff(gains) < 0).all()
    # Leading terms for odds o = exp(-gap): margin 3 o, least confidence 2 o, entropy 2 o (gap + 1).
    leading = {margin_gain: 3.0, least_confidence_gain: 2.0, entropy_gain: 2 * (60.0 + 1)}[gain]
    assert gains[2] == pytest.approx(leading * math.exp(-60), rel=1e-12)


@pytest.mark.parametrize("gain", GAINS)
def test_impossible_classes_and_ties(gain):
    assert gain([[0.0, -np.inf]]).tolist() == [0.0]
    assert gain([[5.0, 5.0, -np.inf]])[0] == pytest.approx(gain([[0.0, 0.0]])[0])
    assert gain(np.zeros((0, 3))).shape == (0,)
    assert gain([[0.0, 0.0]]).dtype == np.float64


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ([[0.0]], r"logits must have shape \[examples, classes\] with at least 2 classes, got shape \(1, 1\)"),
        ([0.0, 1.0], r"logits must have shape \[examples, classes\] with at least 2 classes, got shape \(2,\)"),
        ([[0.0, 1.0], [np.nan, 0.0]], "logits must be numbers below .inf with a finite one in each row, .* in row 1"),
        ([[0.0, np.inf]], "logits must be numbers below .inf with a finite one in each row, .* in row 0"),
        ([[-np.inf, -np.inf]], "logits must be numbers below .inf with a finite one in each row, .* in row 0"),
    ],
)
def test_bad_logits_are_named(gain, logits, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        gain(logits)
