"""Dependent rounding: exact size, exact marginals, no positive correlation, reproducible."""

from __future__ import annotations

from functools import cache
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from distilbeam.selection.rounding import dep_round, round_carries, round_shard, shard_rng

VECTORS = {
    "mixed": [0.1, 0.9, 0.35, 0.65, 0.5, 0.5],
    "equal": [0.5] * 6,
    "small": [0.05, 0.15, 0.2, 0.25, 0.35],
    "large": [0.95, 0.85, 0.8, 0.75, 0.65],
}
DRAWS = 30_000


def joint_probabilities(marginals):
    """Enumerate the pivotal method over every order: exact probabilities of choosing each pair."""
    n = len(marginals)

    @cache
    def chosen_sets(state):
        """Map each set of chosen points to its probability; state: (point, mass) pairs still to meet."""
        if len(state) == 1:
            point, mass = state[0]
            return {frozenset({point}) if round(mass) else frozenset(): 1.0}
        (i, p), (j, q), *rest = state
        alpha, beta = min(1 - p, q), min(p, 1 - q)
        result = {}
        up = beta / (alpha + beta)
        for weight, (a, b) in ((up, (p + alpha, q - alpha)), (1 - up, (p - beta, q + beta))):
            (point, mass), (other, decided) = ((i, a), (j, b)) if 1e-9 < a < 1 - 1e-9 else ((j, b), (i, a))
            for chosen, share in chosen_sets(((point, mass), *rest)).items():
                key = chosen | {other} if round(decided) else chosen
                result[key] = result.get(key, 0.0) + weight * share
        return result

    joint, orders = np.zeros((n, n)), list(permutations(range(n)))
    for order in orders:
        for chosen, share in chosen_sets(tuple((i, marginals[i]) for i in order)).items():
            members = list(chosen)
            joint[np.ix_(members, members)] += share / len(orders)
    return joint


def draw(marginals, draws, seed=0):
    rng = np.random.default_rng(seed)
    return np.array([dep_round(marginals, rng) for _ in range(draws)])


@pytest.mark.parametrize("name", VECTORS)
def test_marginals_and_pairs(name, frequency_bound):
    marginals = np.array(VECTORS[name])
    chosen = draw(marginals, DRAWS)
    assert (chosen.sum(axis=1) == round(marginals.sum())).all()
    pairs = chosen.T.astype(float) @ chosen / DRAWS
    bound = frequency_bound(marginals, DRAWS, len(marginals))
    assert (np.abs(np.diag(pairs) - marginals) < bound).all()
    exact = joint_probabilities(tuple(marginals))
    np.testing.assert_allclose(np.diag(exact), marginals)
    independent = np.outer(marginals, marginals)
    apart = ~np.eye(len(marginals), dtype=bool)
    assert (exact[apart] <= independent[apart] + 1e-12).all()
    assert (np.abs(pairs - exact)[apart] < frequency_bound(exact, DRAWS, exact.size)[apart]).all()


def test_no_pair_of_a_larger_vector_is_positively_correlated(frequency_bound):
    rng = np.random.default_rng(5)
    marginals = rng.random(40)
    marginals *= 13 / marginals.sum()
    chosen = draw(marginals, 20_000, seed=1)
    pairs = chosen.T.astype(float) @ chosen / len(chosen)
    independent = np.outer(marginals, marginals)
    apart = ~np.eye(len(marginals), dtype=bool)
    excess = pairs - independent - frequency_bound(independent, len(chosen), 40 * 39)
    assert excess[apart].max() < 0
    assert (np.abs(np.diag(pairs) - marginals) < frequency_bound(marginals, len(chosen), 40)).all()


@pytest.mark.parametrize("share", [0.003, 0.4, 0.97])
def test_many_points(share):
    rng = np.random.default_rng(2)
    n = 300_000
    marginals = np.clip(rng.random(n) * 2 * share, 0, 1)
    marginals *= np.floor(marginals.sum()) / marginals.sum()
    chosen = dep_round(marginals, rng)
    assert chosen.sum() == round(marginals.sum())
    # Negatively correlated: the variance of a group's count is at most that of independent draws. 60 groups, one in a million.
    groups = rng.integers(60, size=n)
    surplus = np.bincount(groups, weights=chosen - marginals)
    spread = np.sqrt(np.bincount(groups, weights=marginals * (1 - marginals)))
    assert (np.abs(surplus) < norm.isf(0.5e-6 / 60) * spread).all()


def test_shards_with_carries_keep_the_marginals(frequency_bound):
    rng = np.random.default_rng(11)
    sizes = [17, 1, 25, 7, 10]
    marginals = rng.random(60)
    marginals *= 12 / (marginals.sum() - marginals[[0, 30, 59]].sum())
    marginals[[0, 30, 59]] = 1.0
    cuts = np.cumsum([0, *sizes])
    counts, pairs, draws = np.zeros(60), np.zeros((60, 60)), 5_000
    for number in range(draws):
        chosen, carries, probabilities = np.zeros(60, bool), [], []
        for shard, (start, stop) in enumerate(pairwise(cuts)):
            part, carry, probability = round_shard(marginals[start:stop], shard_rng(1, number, str(shard)))
            assert part.sum() + probability == pytest.approx(marginals[start:stop].sum())
            chosen[start:stop] = part
            if carry >= 0:
                assert not part[carry]
                carries.append(start + carry)
                probabilities.append(probability)
        chosen[carries] = round_carries(probabilities, shard_rng(1, number, "carries"))
        assert chosen.sum() == 15
        counts += chosen
        pairs += np.outer(chosen, chosen)
    assert (np.abs(counts / draws - marginals) < frequency_bound(marginals, draws, 60)).all()
    independent = np.outer(marginals, marginals)
    excess = pairs / draws - independent - frequency_bound(independent, draws, 60 * 59)
    assert excess[~np.eye(60, dtype=bool)].max() < 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    marginals=st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 1e-17, 1 - 2**-53])), max_size=50),
    seed=st.integers(0, 2**32),
)
def test_any_shard_is_rounded_down_to_one_carry(marginals, seed):
    chosen, carry, probability = round_shard(marginals, np.random.default_rng(seed))
    assert chosen.sum() + probability == pytest.approx(sum(marginals), abs=1e-9)
    assert 0 <= probability < 1
    assert (carry >= 0) == (probability > 0)
    assert not chosen[np.array(marginals) == 0].any()
    assert chosen[np.array(marginals) == 1].all()
    if carry >= 0:
        assert 0 < marginals[carry] < 1
        assert not chosen[carry]


def test_edges():
    rng = np.random.default_rng(0)
    assert dep_round([], rng).tolist() == []
    assert dep_round([0.0, 1.0, 0.0], rng).tolist() == [False, True, False]
    assert dep_round([1.0, 1.0], rng).all()
    assert round_shard([0.25], rng)[1:] == (0, 0.25)
    assert round_shard([], rng)[1:] == (-1, 0.0)
    assert dep_round([1 - 2**-53, 2**-53], rng).sum() == 1
    assert dep_round(np.full(3, 2 / 3, np.float32), rng).sum() == 2


def test_same_generator_same_choice():
    marginals = np.full(100_000, 0.25)
    first, again, other = (dep_round(marginals, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_shard_generators_are_stable_and_distinct():
    # Fixed numbers: another machine, Python or run must derive the same generator.
    assert shard_rng(0, 0, "a").integers(2**63) == 6439033478242024865
    keys = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (0, 0, "a,0")]
    assert len({int(shard_rng(*key).integers(2**63)) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("marginals", "message"),
    [
        ([0.5, 0.25], r"marginals must sum to a whole number of examples \(within 1e-06\), got 0.75; rad_marginals"),
        ([0.5, 1.5], "marginals must be probabilities from 0 to 1, got 1.5 at index 1"),
        ([-0.5, 0.5], "marginals must be probabilities from 0 to 1, got -0.5 at index 0"),
        ([np.nan], "marginals must be probabilities from 0 to 1, got nan at index 0"),
        ([[0.5, 0.5]], "marginals must have one dimension"),
    ],
)
def test_bad_marginals_are_named(marginals, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dep_round(marginals, np.random.default_rng(0))
