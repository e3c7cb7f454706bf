"""Selectors that know where the teacher errs, and the estimate that they use."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import Ridge

from distilbeam.selection.gains import margin_gain
from distilbeam.selection.strategies.registry import selector
from distilbeam.selection.strategies.selectors import CandidatePool
from distilbeam.selection.trust.local_errors import ClassErrors, LocalErrors

MARGINS = np.array([0.05, 0.3, 0.5, 0.8])
LOGITS = np.log(np.stack([1 + MARGINS, 1 - MARGINS], axis=1))  # gains .95, .7, .5, .2


def test_correct_gain_takes_the_largest_expected_gains():
    pool = CandidatePool(4, LOGITS, errors=np.array([0.9, 0.1, 0.0, 0.0]))  # .095, .63, .5, .2
    assert selector("correct-gain").select(pool, 2, np.random.default_rng(0)).tolist() == [False, True, True, False]


def test_rad_capped_is_greedy_by_expected_gain_where_the_caps_bind():
    errors = np.array([0.9, 0.1, 0.0, 0.0])
    pool = CandidatePool(4, LOGITS, errors=errors, caps=errors)  # k = sum of the caps
    assert selector("rad-capped").select(pool, 2, np.random.default_rng(0)).tolist() == [False, True, True, False]


def test_rad_loss_has_the_games_marginals(frequency_bound):
    # gains .95 .7 .5 .2, median .6, stakes w 1.55 1.3 1.1 .8; F_I = (sum g/w - 1) / sum 1/w is largest at I = 3
    stakes = np.array([1.55, 1.3, 1.1])
    expected = np.array([*(2 / stakes / (1 / stakes).sum()), 0.0])
    pool, rng, draws = CandidatePool(4, LOGITS), np.random.default_rng(6), 300
    counts = sum(selector("rad-loss", wrong=1).select(pool, 2, rng).astype(int) for _ in range(draws))
    assert (np.abs(counts / draws - expected) < frequency_bound(expected, draws, 4) + 1e-12).all()


def test_selectors_ask_for_what_they_need():
    pool, rng = CandidatePool(4, LOGITS, errors=np.full(4, 0.1)), np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"^caps must be given for the selector rad-capped, got none; LocalErrors"):
        selector("rad-capped").select(pool, 2, rng)
    with pytest.raises(ValueError, match=r"^errors must be between 0 and 1"):
        selector("correct-gain").select(CandidatePool(4, LOGITS, errors=np.full(4, 1.1)), 2, rng)


def test_local_errors_by_hand():
    fit = LocalErrors.fit([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 1])
    np.testing.assert_allclose(fit.errors([0.1, 0.2, 0.3, 0.4, 2.0]), [0, 0.5, 0.5, 1, 1])
    z2 = 1.6448536269514722**2  # Wilson's upper limit of 0 of 1 is z^2 / (1 + z^2)
    assert fit.caps([0.0])[0] == pytest.approx(z2 / (1 + z2))
    middle = (0.5 + z2 / 4 + np.sqrt(z2 * 0.25 / 2 + z2**2 / 16)) / (1 + z2 / 2)
    assert fit.caps([0.25])[0] == pytest.approx(middle)


def test_local_errors_find_a_rising_error_rate():
    rng = np.random.default_rng(3)
    gains = rng.random(20_000)
    wrong = (rng.random(20_000) < 0.6 * gains).astype(float)
    fit, at = LocalErrors.fit(gains, wrong), np.linspace(0.1, 0.9, 9)
    # isotonic regression errs by O(n^-1/3) = .037 here; five times that is far from the rates' spread of .48
    assert np.abs(fit.errors(at) - 0.6 * at).max() < 0.1
    assert (fit.caps(at) >= fit.errors(at)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.1], [1.5]), "errors must be between 0 and 1"),
        (([0.1, 0.2], [1.0]), "errors"),
        (([0.1], [1.0], 1.0), "confidence must be between 0 and 1, got 1"),
    ],
)
def test_local_errors_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocalErrors.fit(*arguments)


def test_gain_is_what_the_fit_is_about():
    assert margin_gain(LOGITS) == pytest.approx(1 - MARGINS)


def test_class_errors_are_the_ridge_regression_and_learn_classes():
    rng = np.random.default_rng(8)
    logits = 4 * rng.standard_normal((2_000, 5))
    rates = np.array([0.1, 0.1, 0.8, 0.1, 0.5])[logits.argmax(axis=1)]
    wrong = (rng.random(2_000) < rates).astype(float)
    fit = ClassErrors.fit(logits, wrong)
    features = np.column_stack([softmax(logits, axis=1), margin_gain(logits)])
    expected = Ridge(1.0).fit(features, wrong).predict(features)
    np.testing.assert_allclose(fit.errors(logits), np.clip(expected, 0, 1), atol=1e-9)
    sure = fit.errors(12 * np.eye(5))
    assert sure.argmax() == 2
    # about 400 labels of each class, a standard error of .025 at most, and five of them beside the ridge's pull
    assert np.abs(sure - [0.1, 0.1, 0.8, 0.1, 0.5]).max() < 0.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0, 0.0]], [2.0]), "errors must be between 0 and 1"),
        (([[1.0, 0.0]], [1.0], 0.0), "ridge must be above 0, got 0"),
        ((np.zeros((0, 2)), []), "errors must hold at least one example, got none"),
    ],
)
def test_class_errors_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassErrors.fit(*arguments)
