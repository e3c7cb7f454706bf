"""Uncertainty herding against its objective written out, enumeration, and what it must choose in plain cases."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from distilbeam.selection.gains import margin_gain
from distilbeam.selection.strategies.herding import Herding, herd
from distilbeam.selection.strategies.selectors import CandidatePool


def unit(points):
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def covered(points, gains, labelled, chosen):
    """Compute the objective from the formula, in float64."""
    points, labelled = unit(points), unit(labelled)
    squares = ((points[:, None] - labelled[None]) ** 2).sum(axis=2)
    radius = np.median(squares.min(axis=1))
    centres = np.concatenate([labelled, points[list(chosen)]])
    near = np.exp(-((points[:, None] - centres[None]) ** 2).sum(axis=2) / radius)
    return gains @ near.max(axis=1)


def problem(seed, size=12, labelled=3, dimension=3):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, dimension)), rng.random(size), rng.normal(size=(labelled, dimension))


@pytest.mark.parametrize("seed", range(10))
def test_each_choice_adds_the_most(seed):
    points, gains, labelled = problem(seed)
    order = herd(points, gains, labelled, 5, np.random.default_rng(0)).tolist()
    for step, candidate in enumerate(order):
        before = order[:step]
        values = [covered(points, gains, labelled, [*before, i]) for i in range(len(points))]
        assert covered(points, gains, labelled, [*before, candidate]) == pytest.approx(max(values), rel=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_within_its_guarantee_of_the_best_set(seed):
    points, gains, labelled = problem(seed, size=10)
    nothing = covered(points, gains, labelled, [])
    best = max(covered(points, gains, labelled, chosen) for chosen in combinations(range(10), 4))
    found = covered(points, gains, labelled, herd(points, gains, labelled, 4, np.random.default_rng(0)))
    assert found - nothing >= (1 - 1 / np.e) * (best - nothing)


def test_of_coincident_points_one_is_enough():
    points = np.repeat(np.eye(4), 5, axis=0)  # four places, five points each
    order = herd(points, np.repeat([4.0, 3.0, 2.0, 1.0], 5), np.ones((1, 4)), 4, np.random.default_rng(0))
    assert (order // 5).tolist() == [0, 1, 2, 3]


def test_what_is_labelled_is_covered():
    points = unit(np.array([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]]))
    gains = np.array([1.0, 1.0, 0.5, 0.1, 0.1])
    assert herd(points, gains, points[:1], 1, np.random.default_rng(0)).tolist() == [2]


def test_with_a_narrow_kernel_it_is_the_largest_gains():
    rng = np.random.default_rng(1)
    points, gains = np.eye(40), rng.random(40)
    labelled = np.concatenate([unit(np.eye(40) + 0.03 * rng.normal(size=(40, 40)))])  # the median is small: 0.06
    uncovered = gains * (
        1 - np.exp(-_nearest_in_float64(points, labelled) / np.median(_nearest_in_float64(points, labelled)))
    )
    order = herd(points, gains, labelled, 10, np.random.default_rng(0))
    assert set(order) == set(np.argsort(-uncovered)[:10])


def test_a_sample_of_references_chooses_nearly_as_well():
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(20, 8))
    points = centres[rng.integers(20, size=2000)] + 0.3 * rng.normal(size=(2000, 8))
    gains, labelled = rng.random(2000), rng.normal(size=(5, 8))
    nothing = covered(points, gains, labelled, [])
    whole, part = (
        covered(points, gains, labelled, herd(points, gains, labelled, 30, np.random.default_rng(0), references))
        for references in (2000, 500)
    )
    assert part - nothing > 0.95 * (whole - nothing)


def test_when_the_references_are_covered_gains_of_ones_own_decide():
    rng = np.random.default_rng(3)
    points, gains = np.eye(60), np.linspace(0.1, 1, 60)
    order = herd(points, gains, 0.2 + np.eye(60)[:1], 60, rng, references=5)
    assert sorted(order) == list(range(60))
    others = [i for i in order.tolist() if i in order[5:]]  # five references count twelvefold and come first
    assert np.all(np.diff(gains[others]) < 0)


def test_nothing_labelled_nothing_to_gain_and_empty_embeddings():
    assert len(set(herd(np.zeros((6, 3)), np.ones(6), np.zeros((0, 3)), 4, np.random.default_rng(0)))) == 4
    assert len(set(herd(np.eye(6), np.zeros(6), np.zeros((0, 6)), 6, np.random.default_rng(0)))) == 6


def test_ties_are_broken_by_chance(frequency_bound):
    rng, counts = np.random.default_rng(4), np.zeros(4)
    for _ in range(2_000):
        counts[herd(np.eye(4), np.ones(4), np.zeros((0, 4)), 1, rng)] += 1
    assert (np.abs(counts / 2_000 - 0.25) < frequency_bound(0.25, 2_000, 4)).all()


def test_the_selector_takes_the_margins_gains():
    rng = np.random.default_rng(5)
    logits, points, labelled = rng.normal(size=(50, 4)), rng.normal(size=(50, 6)), rng.normal(size=(8, 6))
    pool = CandidatePool(50, logits, points, labelled)
    chosen = Herding().select(pool, 9, np.random.default_rng(0))
    assert set(np.flatnonzero(chosen)) == set(herd(points, margin_gain(logits), labelled, 9, np.random.default_rng(0)))


def _nearest_in_float64(points, others):
    return ((points[:, None] - others[None]) ** 2).sum(axis=2).min(axis=1)
