from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from distilbeam.student.evaluation.paired import paired


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 0), (0, 5), (14, 3), (60, 41)])
def test_the_probability_is_the_exact_binomial_one(lost: int, won: int) -> None:
    before = np.array([True] * lost + [False] * won + [True] * 7 + [False] * 2)
    after = np.array([False] * lost + [True] * won + [True] * 7 + [False] * 2)
    found = paired(before, after)
    assert (found.lost, found.won) == (lost, won)
    assert found.before == pytest.approx((lost + 7) / len(before))
    assert found.after == pytest.approx((won + 7) / len(before))
    expected = binomtest(lost, lost + won, alternative="greater").pvalue if lost + won else 1.0
    assert found.p == pytest.approx(expected, rel=1e-12)


def test_a_thousand_changes_do_not_overflow() -> None:
    before = np.arange(3000) < 1600
    assert paired(before, ~before).p == pytest.approx(binomtest(1600, 3000, alternative="greater").pvalue, rel=1e-9)


def test_unlike_lengths_are_a_sentence() -> None:
    with pytest.raises(ValueError, match="as long, and not empty, got 2 and 3"):
        paired([True, False], [True, False, True])
