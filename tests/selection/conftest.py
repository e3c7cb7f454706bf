"""Oracles that know nothing of the implementation, as fixtures."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import norm


@pytest.fixture(scope="session")
def value_by_linear_program():
    """Solve the game as a linear program: maximise q.g - k L - sum t, t >= q w - L, sum q = b, q in [0, upper]."""

    def solve(gains, wrong, budget=1, losses=0.0, upper=1.0):
        gains = np.asarray(gains, float)
        n, stakes = len(gains), gains + losses
        cost = np.concatenate([-gains, [wrong], np.ones(n)])
        above = np.hstack([np.diag(stakes), -np.ones((n, 1)), -np.eye(n)])
        total = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
        bounds = [(0, upper)] * n + [(0, None)] * (n + 1)
        result = linprog(
            cost,
            A_ub=above,
            b_ub=np.zeros(n),
            A_eq=total,
            b_eq=[budget],
            bounds=bounds,
            method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        assert result.status == 0, result.message
        return -result.fun

    return solve


@pytest.fixture(scope="session")
def solution_in_fractions():
    """Evaluate the closed form in rational arithmetic: the first maximiser of (I - k) / H_I."""

    def solve(gains, wrong):
        order = sorted(range(len(gains)), key=lambda i: -gains[i])
        total, best = Fraction(0), (None, 0, Fraction(0))
        for count, i in enumerate(order, 1):
            if gains[i] == 0:
                break
            total += 1 / Fraction(gains[i])
            value = (count - Fraction(wrong)) / total
            if best[0] is None or value > best[0]:
                best = (value, count, total)
        value, support, total = best
        probabilities = [Fraction(0)] * len(gains)
        for i in order[:support]:
            probabilities[i] = 1 / Fraction(gains[i]) / total
        return [float(p) for p in probabilities], float(value), support

    return solve


@pytest.fixture(scope="session")
def frequency_bound():
    """Bound |frequency - p| over `cases` simultaneous comparisons; a correct sampler exceeds it once in a million runs."""

    def bound(p, draws, cases):
        z = norm.isf(0.5e-6 / cases)
        p = np.asarray(p)
        return z * np.sqrt(p * (1 - p) / draws) + z**2 / draws  # Bernstein's second term, for p near 0 or 1

    return bound


@pytest.fixture(scope="session")
def log_odds():
    """Make binary log-probabilities with given margins in favour of class 0."""

    def make(margins):
        margins = np.asarray(margins, float)
        return np.log(np.stack([(1 + margins) / 2, (1 - margins) / 2], axis=1))

    return make
