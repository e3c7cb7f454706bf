"""The other selectors: exact budgets, what each is known to choose, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from distilbeam.selection.gains import entropy_gain, least_confidence_gain, margin_gain
from distilbeam.selection.strategies.diverse import Badge, ClusterMargin, KCenter, spread_by_distance
from distilbeam.selection.strategies.registry import distributing, names, selector
from distilbeam.selection.strategies.selectors import CandidatePool


def pool_of(size, rng, classes=4, dimension=5):
    logits, points, errors = rng.normal(size=(size, classes)), rng.normal(size=(size, dimension)), rng.random(size) / 2
    return CandidatePool(size, logits, points, errors=errors, caps=2 * errors)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("budget", [1, 7, 60])
def test_exactly_the_budget_and_reproducible(name, budget):
    pool = pool_of(60, np.random.default_rng(0))
    first, again = (selector(name).select(pool, budget, np.random.default_rng(1)) for _ in range(2))
    assert first.dtype == bool
    assert first.sum() == budget
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("name", names())
def test_coincident_points_and_equal_logits(name):
    same = np.full(30, 0.2)
    pool = CandidatePool(30, np.zeros((30, 3)), np.ones((30, 2)), errors=same, caps=same)
    assert selector(name).select(pool, 11, np.random.default_rng(2)).sum() == 11


def test_which_distribute():
    gains, games = ("margin", "entropy", "least-confidence"), ("rad", "rad-loss", "rad-capped", "correct-gain")
    assert names() == ("uniform", *gains, "greedy", *games, "k-center", "cluster-margin", "badge", "herding")
    assert distributing() == ("uniform", *gains, "greedy", *games)


@pytest.mark.parametrize(
    ("name", "gain"), [("margin", margin_gain), ("entropy", entropy_gain), ("least-confidence", least_confidence_gain)]
)
def test_top_gains(name, gain):
    pool = pool_of(200, np.random.default_rng(3))
    chosen = selector(name).select(pool, 50, np.random.default_rng(0))
    gains = gain(pool.logits)
    assert gains[chosen].min() >= gains[~chosen].max()


def test_ties_of_the_top_gains_are_broken_by_chance(frequency_bound):
    pool = CandidatePool(6, np.array([[0.0, 0.0]] * 4 + [[9.0, 0.0]] * 2))
    rng = np.random.default_rng(4)
    counts = sum(selector("margin").select(pool, 2, rng).astype(int) for _ in range(4_000))
    assert (np.abs(counts[:4] / 4_000 - 0.5) < frequency_bound(0.5, 4_000, 4)).all()
    assert counts[4:].sum() == 0


def test_uniform_has_equal_marginals(frequency_bound):
    pool, rng = CandidatePool(10), np.random.default_rng(5)
    counts = sum(selector("uniform").select(pool, 3, rng).astype(int) for _ in range(5_000))
    assert (np.abs(counts / 5_000 - 0.3) < frequency_bound(0.3, 5_000, 10)).all()


def test_rad_has_the_games_marginals(frequency_bound):
    margins = np.array([0.05, 0.3, 0.5, 0.8])
    pool, rng = CandidatePool(4, np.log(np.stack([1 + margins, 1 - margins], axis=1))), np.random.default_rng(6)
    counts = sum(selector("rad", wrong=1).select(pool, 2, rng).astype(int) for _ in range(5_000))
    gains = 1 - margins
    expected = 2 / gains / (1 / gains[:3]).sum() * [1, 1, 1, 0]
    assert (np.abs(counts / 5_000 - expected) < frequency_bound(expected, 5_000, 4) + 1e-12).all()


def test_k_center_walks_to_the_farthest_point():
    points = np.array([[0.0], [1.0], [10.0], [4.0], [9.0]])
    pool = CandidatePool(5, embeddings=points, labelled_embeddings=np.array([[0.5]]))
    chosen = [np.flatnonzero(KCenter().select(pool, b, np.random.default_rng(0))).tolist() for b in (1, 2, 3)]
    assert chosen == [[2], [2, 3], [2, 3, 4]]  # 10; then 4 (3.5 away); then 9 (1 away), before 0 and 1 (0.5 away)


def test_k_center_is_a_two_approximation():
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(6, 3)) * 100
    points = np.repeat(centres, 20, axis=0) + rng.normal(size=(120, 3))
    chosen = KCenter().select(CandidatePool(120, embeddings=points), 6, rng)
    assert sorted(np.flatnonzero(chosen) // 20) == list(range(6))


def test_cluster_margin_takes_small_clusters_first():
    # Three clusters of 1, 3 and 8 candidates; the first round visits all of them, the second the two larger ones.
    places = np.repeat([0.0, 100.0, 200.0], [1, 3, 8])
    pool = CandidatePool(12, np.zeros((12, 2)), places[:, None] + np.arange(12)[:, None] * 0.01)
    rule = ClusterMargin(oversampling=4, cluster_size=4)
    sizes = [
        np.bincount((places[rule.select(pool, b, np.random.default_rng(0))] // 100).astype(int), minlength=3)
        for b in (3, 5)
    ]
    assert [size.tolist() for size in sizes] == [[1, 1, 1], [1, 2, 2]]
    one = ClusterMargin(oversampling=12, cluster_size=4).select(pool, 1, np.random.default_rng(0))
    assert np.flatnonzero(one).tolist() == [0]


def test_cluster_margin_only_considers_small_margins():
    rng = np.random.default_rng(8)
    pool = pool_of(300, rng)
    chosen = ClusterMargin(oversampling=3).select(pool, 20, rng)
    rank = np.argsort(np.argsort(-margin_gain(pool.logits)))
    assert rank[chosen].max() < 60


def test_badge_distances_are_those_of_the_gradients(frequency_bound):
    rng = np.random.default_rng(9)
    pool = pool_of(7, rng, classes=3, dimension=2)
    f = np.exp(pool.logits) / np.exp(pool.logits).sum(axis=1, keepdims=True)
    residual = f - np.eye(3)[f.argmax(axis=1)]
    gradients = (residual[:, :, None] * pool.embeddings[:, None, :]).reshape(7, -1)
    squares = ((gradients[:, None] - gradients[None]) ** 2).sum(axis=2)
    step = squares / squares.sum(axis=1, keepdims=True)
    pairs = (step + step.T) / 7  # the first by chance, the second in proportion to its squared distance
    draws, counts = 8_000, np.zeros((7, 7))
    for _ in range(draws):
        chosen = Badge().select(pool, 2, rng)
        counts += np.outer(chosen, chosen)
    apart = ~np.eye(7, dtype=bool)
    assert (np.abs(counts / draws - pairs) < frequency_bound(pairs, draws, 21))[apart].all()


def test_spread_draws_each_point_once():
    points = np.array([0.0, 0.0, 0.0, 5.0])
    drawn = spread_by_distance(4, 4, lambda i: (points - points[i]) ** 2, np.random.default_rng(0))
    assert sorted(drawn) == [0, 1, 2, 3]


def test_refusals():
    rng = np.random.default_rng(0)
    pool = pool_of(30, rng)
    with pytest.raises(
        ValueError, match=r"^selector must be one of uniform, margin, .*, badge, herding, or module:Class, got bald$"
    ):
        selector("bald")
    with pytest.raises(ValueError, match=r"^the selector k-center does not take all of the options wrong$"):
        selector("k-center", wrong=3)
    with pytest.raises(ValueError, match=r"^budget must be at most the 30 unlabelled examples, got 31$"):
        selector("uniform").select(pool, 31, rng)
    message = (
        "^pool must hold at most 20 examples for the selector k-center, which compares examples with each other in memory, "
        "got 30; use uniform, margin, entropy, least-confidence, greedy, rad, rad-loss, rad-capped, correct-gain, or a random part of the pool$"
    )
    with pytest.raises(ValueError, match=message):
        selector("k-center", limit=20).select(pool, 5, rng)
    with pytest.raises(
        ValueError, match=r"^budget must be at most the 10 candidates that cluster-margin clusters in memory, got 11$"
    ):
        selector("cluster-margin", candidate_limit=10).select(pool, 11, rng)


def test_missing_or_unfit_arrays_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"^logits must be given for the selector rad, got none$"):
        selector("rad").select(CandidatePool(3), 1, rng)
    with pytest.raises(ValueError, match=r"^embeddings must be given for the selector badge, got none$"):
        selector("badge").select(CandidatePool(3, np.zeros((3, 2))), 1, rng)
    with pytest.raises(ValueError, match=r"^embeddings must have shape \[3 examples, dimensions\], got \(2, 2\)$"):
        selector("k-center").select(CandidatePool(3, embeddings=np.zeros((2, 2))), 1, rng)
    with pytest.raises(ValueError, match=r"^logits must have one entry for each of the 3 entries of pool, got 2$"):
        selector("margin").select(CandidatePool(3, np.zeros((2, 2))), 1, rng)
    with pytest.raises(ValueError, match=r"^embeddings must be finite in each row"):
        selector("k-center").select(CandidatePool(1, embeddings=np.array([[np.nan]])), 1, rng)
    labelled = CandidatePool(2, embeddings=np.zeros((2, 2)), labelled_embeddings=np.zeros((1, 3)))
    with pytest.raises(ValueError, match=r"^labelled_embeddings must have the pool's 2 dimensions, got 3$"):
        selector("k-center").select(labelled, 1, rng)
