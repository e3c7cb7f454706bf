"""Regret, non-inferiority and power: by hand, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.science.noninferiority import (
    benjamini_hochberg,
    beside,
    least_lead,
    not_worse,
    over_datasets,
    regrets,
)


def test_the_procedure_of_benjamini_and_hochberg_by_hand():
    # thresholds .01, .02, .03, .04, .05: the third passes by itself, and takes the second with it
    assert benjamini_hochberg([0.03, 0.005, 0.025, 0.2, 0.5]).tolist() == [True, True, True, False, False]
    assert benjamini_hochberg([0.9, 0.06]).tolist() == [False, False]
    assert benjamini_hochberg([]).tolist() == []


def test_false_discoveries_are_as_rare_as_they_should_be():
    rng, shares = np.random.default_rng(0), []
    for _ in range(2_000):
        p = np.concatenate([rng.random(15), stats.norm.sf(rng.normal(3, 1, 5)) * 2])
        found = benjamini_hochberg(np.minimum(p, 1), 0.2)
        shares.append(found[:15].sum() / max(1, found.sum()))
    # .2 x 15 / 20 of the discoveries are false in the mean; a share's deviation is at most 1/2
    assert abs(np.mean(shares) - 0.15) < 4 * np.std(shares) / np.sqrt(2_000)


@pytest.mark.parametrize("comparisons", [1, 100])
def test_a_lead_of_the_least_size_is_found_four_times_of_five(comparisons):
    lead = least_lead(2.0, 5, comparisons)
    rng = np.random.default_rng(1)
    p = stats.ttest_1samp(rng.normal(lead, 2.0, (20_000, 5)), 0, axis=1).pvalue
    # a quantile of t in place of the noncentral one errs to the careful side, by up to .12 with four degrees of freedom
    assert 0.8 - 4 * 0.4 / np.sqrt(20_000) - 0.12 < (p < 0.05 / comparisons).mean() < 0.95


def test_non_inferiority_by_hand():
    a, b = np.array([0.50, 0.52, 0.54]), np.array([0.51, 0.51, 0.55])
    shown = beside({"x": {"a": a, "b": b}}, "a", "b")
    d = a - b
    low = d.mean() - stats.t.ppf(0.95, 2) * d.std(ddof=1) / np.sqrt(3)
    assert shown.mean == pytest.approx(d.mean())
    assert shown.low == pytest.approx(low)
    needed = (stats.t.ppf(0.95, 2) + stats.t.ppf(0.8, 2)) * d.std(ddof=1) / np.sqrt(3)
    assert shown.least == pytest.approx(needed)
    datasets = {"one": {"x": {"a": a, "b": b}}, "two": {"x": {"a": a, "b": b - 0.05}}, "three": {"x": {"a": a}}}
    assert not_worse(datasets, "a", ["a", "b"], -low + 1e-9) == (2, 2)
    assert not_worse(datasets, "a", ["a", "b"], -low - 1e-9) == (1, 2)
    assert beside({"x": {"a": a[:2], "b": b[:2]}}, "a", "b") is None


def test_regret_of_equal_methods_is_no_regret():
    # the largest mean of ten equal methods is 1.54 deviations of a mean too large; the best of the other seeds is not
    rng, found = np.random.default_rng(2), []
    for _ in range(500):
        results = {str(number): rng.normal(size=5) for number in range(10)}
        found.append(regrets({"x": results}, "0", list(results))["x"])
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(500)
    results = {"a": np.full(5, 0.6), "b": np.full(5, 0.5), "c": np.full(5, np.nan)}
    assert regrets({"x": results}, "b", ["a", "b"])["x"] == pytest.approx(0.1)
    assert regrets({"x": results}, "a", ["a", "b"])["x"] == 0
    assert regrets({"x": results}, "c", ["a", "c"]) == {}


def test_the_data_set_is_the_unit():
    seeds = np.zeros(3)
    datasets = {str(lead): {"x": {"a": seeds + lead, "b": seeds}} for lead in (0.01, 0.02, 0.06)}
    found = over_datasets(datasets, "a", "b")
    assert found.mean == pytest.approx(0.03)
    half = stats.t.ppf(0.975, 2) * np.std([0.01, 0.02, 0.06], ddof=1) / np.sqrt(3)
    assert found.half == pytest.approx(half)
    assert over_datasets(dict(list(datasets.items())[:2]), "a", "b") is None
