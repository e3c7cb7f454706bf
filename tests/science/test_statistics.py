"""The rule for "not worse", by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.science.statistics import aggregate, holm, interval, judge, paired_p


def test_interval_by_hand():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)  # t of 97.5 %, two degrees of freedom
    assert interval([1.0]).half == np.inf


def test_paired_p_by_hand():
    # mean 2, deviation 1, t = 2 sqrt 3 with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2)
    assert paired_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(1 - np.sqrt(12 / 14))
    assert paired_p(np.zeros(4)) == 1
    assert paired_p(np.ones(4)) == 0


def test_holm_stops_at_the_first_that_fails():
    # 0.01 <= .05/4, 0.015 <= .05/3, then 0.04 > .05/2, hence 0.045 <= .05/1 is not rejected either
    assert holm([0.04, 0.01, 0.045, 0.015]).tolist() == [False, True, False, True]
    assert holm([0.001, 0.002]).all()


def test_judge_finds_the_setting_where_a_method_is_worse():
    rng = np.random.default_rng(0)
    noise = lambda: 0.001 * rng.standard_normal(8)  # noqa: E731
    settings = {
        "bad": {"a": 0.5 + noise(), "b": 0.6 + noise(), "c": 0.4 + noise()},
        "good": {"a": 0.7 + noise(), "b": 0.6 + noise(), "c": 0.4 + noise()},
        "few": {"a": np.array([0.5, np.nan, np.nan]), "b": np.array([0.9, np.nan, np.nan])},
    }
    found = judge(settings, "a", ["a", "b", "c"])
    assert set(found) == {"bad", "good"}
    assert found["bad"].worse_than == ("b",)
    assert found["bad"].best == "b"
    assert found["bad"].behind.mean == pytest.approx(0.1, abs=0.002)
    assert not found["bad"].shown
    assert found["good"].worse_than == ()
    assert found["good"].shown


def test_aggregate_takes_the_seeds_that_have_every_setting():
    settings = {
        "one": {"a": np.array([0.3, 0.4, 0.5, 0.9]), "b": np.full(4, 0.1)},
        "two": {"a": np.array([0.1, 0.2, 0.3, np.nan]), "b": np.full(4, 0.1)},
    }
    found = aggregate(settings, "a", "b")
    assert found is not None
    assert found.count == 3
    assert found.mean == pytest.approx((0.1 + 0.2 + 0.3) / 3)
    assert aggregate(settings, "a", "c") is None
    settings["two"]["b"][0] = np.nan
    assert aggregate(settings, "a", "b") is None, "two seeds say nothing"
