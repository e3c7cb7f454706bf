"""Ties within rounding, and the estimates that must not see through them."""

from __future__ import annotations

import numpy as np

from distilbeam.selection.trust.local_errors import LocalErrors
from distilbeam.selection.trust.ties import merge_ties


def test_values_within_rounding_become_one():
    values = np.array([0.3, 0.1 + 0.2, 0.7, 0.3 + 2e-9, 0.3 - 1e-16])
    merged = merge_ties(values)
    assert merged.tolist() == [values.min(), values.min(), 0.7, 0.3 + 2e-9, values.min()]
    assert merge_ties(np.zeros(0)).shape == (0,)
    np.testing.assert_array_equal(merge_ties(np.linspace(0, 1, 1000)), np.linspace(0, 1, 1000))


def test_a_rate_does_not_follow_the_last_bits_of_the_gains():
    # Half of 100 equal gains are wrong, and rounding happens to make those the larger ones.
    wrong = np.arange(100) % 2
    fit = LocalErrors.fit(0.25 + wrong * 2.0**-52, wrong)
    np.testing.assert_allclose(fit.errors(0.25 + np.array([0.0, 1.0, 2.0]) * 2.0**-52), 0.5)
