"""The game of Robust Active Distillation against published vectors, rational arithmetic and linear programs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distilbeam.selection.games.rad import guaranteed_gain, rad_distribution, rad_loss_distribution, rad_marginals

EXAMPLES = settings(max_examples=250, deadline=None, derandomize=True)
UNIT_GAINS = st.one_of(
    st.floats(0.001, 10.0), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.floats(-6, 6).map(lambda x: float(np.exp(x)))
)
POOLS = st.lists(UNIT_GAINS, min_size=1, max_size=14).map(np.array)

PLAIN = [
    ([4, 3, 2, 1], 0, 1, np.array([1, 0, 0, 0]), 4),
    ([4, 3, 2, 1], 1, 3, np.array([3, 4, 6, 0]) / 13, 24 / 13),
    ([4, 3, 2, 1], 2, 4, np.array([3, 4, 6, 12]) / 25, 24 / 25),
    ([4, 3, 2, 1], 3, 4, np.array([3, 4, 6, 12]) / 25, 12 / 25),
    ([1, 1, 1, 1], 1, 4, np.ones(4) / 4, 3 / 4),
    ([10, 1, 1, 1, 1], 1, 5, np.array([1, 10, 10, 10, 10]) / 41, 40 / 41),
    ([10, 1, 1, 1, 1], 2, 5, np.array([1, 10, 10, 10, 10]) / 41, 30 / 41),
    ([5, 5, 4, 2, 1, 0.5], 2, 4, np.array([4, 4, 5, 10, 0, 0]) / 23, 40 / 23),
]
CAPPED = [
    ([4, 3, 2, 1], 1, 2, np.array([6, 8, 12, 0]) / 13, 48 / 13),
    ([4, 3, 2, 1], 1, 3, [3 / 4, 1, 1, 1 / 4], 21 / 4),
    ([4, 3, 2, 1], 0, 2, [1, 1, 0, 0], 7),
    ([4, 3, 2, 1], 2, 2, np.array([6, 8, 12, 24]) / 25, 48 / 25),
    ([4, 3, 2, 1], 2, 3, [6 / 13, 8 / 13, 12 / 13, 1], 37 / 13),
    ([5, 4, 3, 2, 1, 0.5], 1, 3, [4 / 5, 1, 1, 1 / 5, 0, 0], 37 / 5),
    ([5, 4, 3, 2, 1, 0.5], 2, 4, [3 / 5, 3 / 4, 1, 1, 13 / 20, 0], 113 / 20),
]
LOSS_GAINS = np.array([0.9, 0.8, 0.5, 0.2])
LOSSES = [
    ([0.1, 0.2, 0.5, 0.8], 1, 3, [1 / 3, 1 / 3, 1 / 3, 0], 0.4),
    (LOSS_GAINS, 1, 3, [0.254777, 0.286624, 0.458599, 0], 0.229299),
    ([1.0] * 4, 1, 4, [0.203851, 0.215176, 0.258211, 0.322763], 0.161948),
    ([1.0] * 4, 2, 4, [0.203851, 0.215176, 0.258211, 0.322763], -0.225368),
]


@pytest.mark.parametrize(("gains", "wrong", "support", "probabilities", "value"), PLAIN)
def test_plain_vectors(gains, wrong, support, probabilities, value):
    solution = rad_distribution(gains, wrong)
    np.testing.assert_allclose(solution.probabilities, probabilities, rtol=1e-14)
    assert solution.value == pytest.approx(value, rel=1e-14)
    assert solution.support == support
    assert not solution.fallback


@pytest.mark.parametrize(("gains", "wrong", "budget", "probabilities", "value"), CAPPED)
def test_capped_vectors(gains, wrong, budget, probabilities, value):
    solution = rad_marginals(gains, wrong, budget)
    np.testing.assert_allclose(solution.probabilities, probabilities, rtol=1e-14)
    assert solution.value == pytest.approx(value, rel=1e-14)
    assert solution.support == np.count_nonzero(probabilities)


@pytest.mark.parametrize(("losses", "wrong", "support", "probabilities", "value"), LOSSES)
def test_loss_vectors(losses, wrong, support, probabilities, value):
    solution = rad_loss_distribution(LOSS_GAINS, losses, wrong)
    np.testing.assert_allclose(solution.probabilities, probabilities, atol=5e-7)
    assert solution.value == pytest.approx(value, abs=5e-7)
    assert solution.support == support


@EXAMPLES
@given(gains=POOLS, share=st.floats(0, 1.1))
def test_plain_solution_is_the_linear_programs(value_by_linear_program, gains, share):
    wrong = share * len(gains)
    solution = rad_distribution(gains, wrong)
    optimum = value_by_linear_program(gains, wrong, upper=None)
    scale = max(1.0, gains.max())
    assert solution.probabilities.sum() == pytest.approx(1)
    assert solution.value == pytest.approx(optimum, abs=1e-9 * scale)
    assert guaranteed_gain(gains, solution.probabilities, wrong) == pytest.approx(optimum, abs=1e-9 * scale)


@EXAMPLES
@given(gains=POOLS, share=st.one_of(st.floats(0, 1.1), st.sampled_from([0, 0.25, 0.5])), bought=st.floats(0, 1))
def test_capped_solution_is_the_linear_programs(value_by_linear_program, gains, share, bought):
    wrong, budget = share * len(gains), max(1, round(bought * len(gains)))
    solution = rad_marginals(gains, wrong, budget)
    optimum = value_by_linear_program(gains, wrong, budget)
    scale = budget * max(1.0, gains.max())
    assert solution.probabilities.sum() == pytest.approx(budget)
    assert solution.probabilities.min() >= 0
    assert solution.probabilities.max() <= 1
    assert solution.value == pytest.approx(optimum, abs=1e-9 * scale)
    assert guaranteed_gain(gains, solution.probabilities, wrong) == pytest.approx(optimum, abs=1e-9 * scale)


@pytest.mark.parametrize("seed", range(4))
def test_capped_solution_on_random_pools(value_by_linear_program, seed):
    # Hypothesis likes small and round numbers; most ways of being capped need larger pools and any real k.
    rng = np.random.default_rng(seed)
    for _ in range(100):
        n = int(rng.integers(2, 40))
        gains = [rng.random(n), rng.exponential(size=n) ** 3, rng.integers(0, 9, n).astype(float)][rng.integers(3)]
        wrong, budget = rng.random() * n, int(rng.integers(1, n + 1))
        solution = rad_marginals(gains, wrong, budget)
        optimum = value_by_linear_program(gains, wrong, budget)
        scale = max(1.0, gains.sum())
        assert solution.value == pytest.approx(optimum, abs=1e-9 * scale)
        assert solution.probabilities.sum() == pytest.approx(budget)
        assert guaranteed_gain(gains, solution.probabilities, wrong) == pytest.approx(optimum, abs=1e-9 * scale)


@EXAMPLES
@given(
    points=st.lists(st.tuples(UNIT_GAINS, st.one_of(st.just(0.0), st.floats(0, 5))), min_size=1, max_size=12),
    share=st.floats(0, 1),
)
def test_loss_solution_is_the_linear_programs(value_by_linear_program, points, share):
    gains, losses = np.array(points).T
    wrong = share * len(gains)
    solution = rad_loss_distribution(gains, losses, wrong)
    optimum = value_by_linear_program(gains, wrong, losses=losses, upper=None)
    scale = max(1.0, gains.max(), losses.max())
    guarantee = guaranteed_gain(gains, solution.probabilities, wrong, losses)
    assert guarantee == pytest.approx(solution.value, abs=1e-9 * scale)
    if solution.fallback:
        assert guarantee <= optimum + 1e-9 * scale
        assert optimum == pytest.approx(-losses.min(), abs=1e-9 * scale)
    else:
        assert solution.value == pytest.approx(optimum, abs=1e-9 * scale)


@EXAMPLES
@given(
    exponents=st.lists(st.floats(-300, 300), min_size=1, max_size=30, unique=True),
    wrong=st.one_of(st.integers(0, 5), st.floats(0, 5)),
)
def test_gains_of_any_range_against_rational_arithmetic(solution_in_fractions, exponents, wrong):
    gains = [10.0**exponent for exponent in exponents]
    assume(len(set(gains)) == len(gains) > wrong)
    probabilities, value, support = solution_in_fractions(gains, wrong)
    solution = rad_distribution(gains, wrong)
    np.testing.assert_allclose(solution.probabilities, probabilities, rtol=1e-12, atol=1e-300)
    assert solution.value == pytest.approx(value, rel=1e-11, abs=1e-323)
    assert solution.support == support


@pytest.mark.parametrize("decades", [1, 10, 300])
def test_random_gains_of_any_range_against_rational_arithmetic(solution_in_fractions, decades):
    rng = np.random.default_rng(decades)
    for _ in range(300):
        gains = list(10.0 ** np.unique(rng.uniform(-decades, decades, rng.integers(6, 30))))
        wrong = float(rng.choice([rng.integers(0, 5), 5 * rng.random()]))
        probabilities, value, support = solution_in_fractions(gains, wrong)
        solution = rad_distribution(gains, wrong)
        np.testing.assert_allclose(solution.probabilities, probabilities, rtol=1e-12, atol=1e-300)
        assert solution.value == pytest.approx(value, rel=1e-11, abs=1e-323)
        assert solution.support == support


def test_smallest_and_largest_floats(solution_in_fractions):
    gains = [5e-324, 1e308, 3e-310, 1e-300]
    probabilities, value, support = solution_in_fractions(gains, 3)
    solution = rad_distribution(gains, 3)
    np.testing.assert_allclose(solution.probabilities, probabilities, rtol=1e-14, atol=1e-300)
    assert (solution.value, solution.support) == (value, support)
    assert rad_marginals(gains, 1, 2).probabilities.sum() == pytest.approx(2)


@pytest.mark.parametrize("wrong", [0.5, 1, 2, 3.25])
def test_guarantee_under_a_wrong_number_of_errors(wrong):
    gains = np.array([5, 5, 4, 3, 2.5, 2, 1, 0.5])
    solution = rad_distribution(gains, wrong)
    stakes = solution.probabilities * gains
    harmonic = (1 / np.sort(gains)[::-1][: solution.support]).sum()
    for errors in range(solution.support + 1):
        worst = min(stakes.sum() - sum(stakes[list(chosen)]) for chosen in combinations(range(len(gains)), errors))
        assert worst == pytest.approx((solution.support - errors) / harmonic)
        assert guaranteed_gain(gains, solution.probabilities, errors) == pytest.approx(worst)


@EXAMPLES
@given(gains=POOLS, share=st.floats(0, 1), scale=st.floats(1e-6, 1e6))
def test_scale_and_order_do_not_matter(gains, share, scale):
    wrong, budget = share * len(gains), max(1, len(gains) // 3)
    plain = rad_marginals(gains, wrong, budget)
    order = np.random.default_rng(0).permutation(len(gains))
    np.testing.assert_allclose(rad_marginals(gains[order], wrong, budget).probabilities, plain.probabilities[order])
    # Rounding in the scaling may tip a tie of two optima, so the value is compared, not the choice.
    assert rad_marginals(gains * scale, wrong, budget).value == pytest.approx(plain.value * scale, abs=1e-9 * scale)


def test_lower_gain_higher_probability_inside_the_support():
    rng = np.random.default_rng(3)
    gains = np.sort(rng.random(200))[::-1]
    solution = rad_distribution(gains, 20)
    inside = solution.probabilities[: solution.support]
    assert (np.diff(inside) > 0).all()
    np.testing.assert_allclose(inside * gains[: solution.support], inside[0] * gains[0])
    assert gains[solution.support - 1] > solution.value >= gains[solution.support]


def test_equal_gains_share_equally():
    np.testing.assert_allclose(rad_distribution([2, 2, 1], 0).probabilities, [0.5, 0.5, 0])
    np.testing.assert_allclose(rad_marginals([3, 2, 2, 2, 1], 0, 2).probabilities, [1, 1 / 3, 1 / 3, 1 / 3, 0])


def test_capped_optimum_beats_the_clipped_distribution():
    rng = np.random.default_rng(0)
    lost = []
    for _ in range(100):
        gains = rng.exponential(size=20)
        best = rad_marginals(gains, 1.5, 12)
        clipped = np.minimum(1, 12 * rad_distribution(gains, 1.5).probabilities)
        lost.append(1 - guaranteed_gain(gains, clipped, 1.5) / best.value)
    assert min(lost) > -1e-12
    assert np.mean(lost) > 0.05


def test_budget_of_the_whole_pool_buys_everything():
    solution = rad_marginals([3.0, 0.0, 1.0, 2.0], 1.5, 4)
    np.testing.assert_array_equal(solution.probabilities, 1)
    assert solution.value == 3 + 2 + 1 - 3 - 0.5 * 2


def test_leftover_budget_goes_to_points_without_gain():
    solution = rad_marginals([3.0, 0.0, 0.0, 2.0], 1, 3)
    np.testing.assert_allclose(solution.probabilities, [1, 0.5, 0.5, 1])
    assert solution.value == 2


def test_leftover_budget_raises_the_common_level():
    gains = [4.0, 3.0, 2.0, 1.0]
    solution = rad_marginals(gains * 2, 4.5, 7)
    assert solution.probabilities.sum() == pytest.approx(7)
    spent = (solution.probabilities * (gains * 2))[solution.probabilities < 1]
    np.testing.assert_allclose(spent, spent[0])


@pytest.mark.parametrize("gain", [0.25, 7.0])
def test_one_example(gain):
    assert rad_distribution([gain], 0.25).probabilities.tolist() == [1]
    assert rad_distribution([gain], 0.25).value == 0.75 * gain
    assert rad_marginals([gain], 0, 1).value == gain


@pytest.mark.parametrize(("gains", "wrong"), [([3, 2, 0, 0], 2), ([3, 2, 0, 0], 2.5), ([0, 0], 0), ([1, 1], 99)])
def test_more_errors_than_gains_fall_back_to_uniform(gains, wrong):
    positive = np.count_nonzero(gains)
    for budget, solution in ((1, rad_distribution(gains, wrong)), (2, rad_marginals(gains, wrong, 2))):
        np.testing.assert_array_equal(solution.probabilities, budget / len(gains))
        assert solution.value == 0
        assert solution.support == len(gains)
        assert solution.fallback == (
            f"uniform over the pool: {wrong:g} wrong labels can cover all {positive} positive gains"
        )


def test_losses_that_outweigh_every_gain_fall_back_to_the_plain_game():
    gains, losses = [3.0, 2.0, 1.0], [9.0, 9.0, 1.0]
    solution = rad_loss_distribution(gains, losses, 2.9)
    plain = rad_distribution(gains, 2.9)
    np.testing.assert_array_equal(solution.probabilities, plain.probabilities)
    assert solution.fallback == "losses left out: 2.9 wrong labels cost more than any choice can gain"
    assert solution.value == pytest.approx(guaranteed_gain(gains, plain.probabilities, 2.9, losses))


def test_losses_may_be_one_number_or_the_median_gain():
    by_default = rad_loss_distribution(LOSS_GAINS, None, 1)
    np.testing.assert_array_equal(by_default.probabilities, rad_loss_distribution(LOSS_GAINS, 0.65, 1).probabilities)
    without = rad_loss_distribution(LOSS_GAINS, 0.0, 1)
    np.testing.assert_allclose(without.probabilities, rad_distribution(LOSS_GAINS, 1).probabilities)
    nothing = rad_loss_distribution([0.0, 0.0], 0.0, 1)
    assert nothing.fallback.startswith("losses left out")


def test_float32_gains_are_taken_as_they_are():
    gains = np.random.default_rng(0).random(1000, np.float32)
    narrow, wide = rad_marginals(gains, 50.5, 200), rad_marginals(gains.astype(float), 50.5, 200)
    np.testing.assert_array_equal(narrow.probabilities, wide.probabilities)
    assert narrow.value == wide.value


@pytest.mark.parametrize(
    ("gains", "wrong", "budget", "message"),
    [
        ([1, -2], 0, 1, "gains must be finite and at least 0, got -2.0 at index 1"),
        ([1, np.nan], 0, 1, "gains must be finite and at least 0, got nan at index 1"),
        ([np.inf, 1], 0, 1, "gains must be finite and at least 0, got inf at index 0"),
        ([[1, 2]], 0, 1, r"gains must have one dimension, one value per example, got shape \(1, 2\)"),
        ([], 0, 1, "gains must hold at least one example, got none"),
        (["a"], 0, 1, "gains must be real numbers, got dtype <U1"),
        ([1, 2], -1, 1, "wrong must be a finite number of wrong labels, at least 0, got -1"),
        ([1, 2], np.nan, 1, "wrong must be a finite number of wrong labels, at least 0, got nan"),
        ([1, 2], 0, 0, "budget must be at least 1 example, got 0"),
        ([1] * 1200, 0, 5000, "budget must be at most the 1,200 unlabelled examples, got 5,000"),
        ([1, 2], 0, 1.5, "budget must be a whole number of examples, got 1.5"),
    ],
)
def test_bad_input_is_named(gains, wrong, budget, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        rad_marginals(gains, wrong, budget)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([1, 2, 3], "losses must have one entry for each of the 2 entries of gains, got 3"),
        ([1, -1], "losses must be finite and at least 0, got -1.0 at index 1"),
    ],
)
def test_bad_losses_are_named(losses, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        rad_loss_distribution([1, 2], losses, 1)


def test_guaranteed_gain_of_real_numbers_of_errors():
    assert guaranteed_gain([4, 2], [0.5, 0.5], 0) == 3
    assert guaranteed_gain([4, 2], [0.5, 0.5], 0.5) == 2
    assert guaranteed_gain([4, 2], [0.5, 0.5], 1.5) == 0.5
    assert guaranteed_gain([4, 2], [0.5, 0.5], 9) == 0
    assert guaranteed_gain([4, 2], [0.5, 0.5], 1, losses=2) == 0
    with pytest.raises(
        ValueError, match=r"^probabilities must have one entry for each of the 2 entries of gains, got 1$"
    ):
        guaranteed_gain([4, 2], [1.0], 1)
