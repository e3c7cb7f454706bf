"""The game with local caps: its limits by hand, its value against linear programs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from distilbeam.selection.games.capped import capped_marginals
from distilbeam.selection.games.rad import rad_marginals


def guaranteed(q, gains, caps, losses, wrong):
    """The adversary's best answer: the most harmful points first, each up to its cap."""
    harm = q * (gains + losses)
    left, total = wrong, float((q * gains).sum())
    for i in np.argsort(-harm):
        used = min(caps[i], left)
        total, left = total - used * harm[i], left - used
    return total


def linear_program(gains, caps, losses, wrong, budget):
    """Maximise q g - k lam - c t subject to t >= q w - lam, sum q = b, 0 <= q <= 1."""
    n = len(gains)
    objective = -np.concatenate([gains, [-wrong], -caps])
    rows = np.hstack([np.diag(gains + losses), -np.ones((n, 1)), -np.eye(n)])
    total = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
    bounds = [(0, 1)] * n + [(0, None)] * (n + 1)
    return -linprog(objective, rows, np.zeros(n), total, [budget], bounds, method="highs").fun


def test_value_is_that_of_the_linear_program_and_is_guaranteed():
    rng = np.random.default_rng(5)
    for _ in range(300):
        n = int(rng.integers(2, 25))
        gains = rng.choice([rng.random(n), rng.integers(0, 4, n) / 2, rng.lognormal(0, 2, n)])
        caps = rng.choice([rng.random(n), np.ones(n), rng.integers(0, 3, n) / 2])
        losses = rng.choice([np.zeros(n), rng.random(n), np.full(n, np.median(gains))])
        wrong, budget = float(rng.random() * n), int(rng.integers(1, n + 1))
        solution = capped_marginals(gains, caps, wrong, budget, losses)
        best = linear_program(gains, caps, losses, wrong, budget)
        scale = 1e-9 * (1 + gains.sum() + losses.sum())
        assert abs(solution.value - best) <= scale
        assert abs(guaranteed(solution.probabilities, gains, caps, losses, wrong) - best) <= scale
        assert abs(solution.probabilities.sum() - budget) <= 1e-9 * budget
        assert solution.probabilities.min() >= 0
        assert solution.probabilities.max() <= 1


def test_caps_of_one_are_the_plain_game():
    rng = np.random.default_rng(6)
    for _ in range(100):
        gains, wrong, budget = rng.random(12), float(rng.random() * 8), int(rng.integers(1, 13))
        plain = rad_marginals(gains, wrong, budget)
        assert capped_marginals(gains, 1.0, wrong, budget).value == pytest.approx(plain.value, abs=1e-12)


def test_no_wrong_label_is_greedy_and_binding_caps_are_greedy_by_expected_gain():
    gains, caps = np.array([4.0, 3.0, 2.0, 1.0]), np.array([0.9, 0.1, 0.2, 0.1])
    assert capped_marginals(gains, caps, 0, 2).probabilities.tolist() == [1, 1, 0, 0]
    bound = capped_marginals(gains, caps, caps.sum(), 2)
    assert bound.probabilities.tolist() == [0, 1, 1, 0]
    assert bound.value == pytest.approx(2.7 + 1.6)


def test_equal_points_share_equally():
    q = capped_marginals(np.full(10, 2.0), 0.5, 2, 4).probabilities
    assert np.allclose(q, 0.4, atol=1e-15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], [0.5, 1.2], 1, 1), r"caps must be between 0 and 1"),
        (([1.0, 2.0], [0.5], 1, 1), r"caps"),
        (([1.0, 2.0], 0.5, -1, 1), r"wrong"),
        (([1.0, 2.0], 0.5, 1, 3), r"budget"),
        (([1.0, 2.0], 0.5, 1, 1, -0.1), r"losses must be finite and at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        capped_marginals(*arguments)
