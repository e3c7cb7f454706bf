"""Uncertainty herding against its objective written out, enumeration, and what it must choose in plain cases."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from distilbeam.selection.gains import margin_gain
from distilbeam.selection.strategies import facility_location
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


def groups(seed, size=2000):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, 8))
    points = centres[rng.integers(20, size=size)] + 0.3 * rng.normal(size=(size, 8))
    return points, rng.random(size), rng.normal(size=(5, 8))


# summed over the references alone, as it was once, the choice covers .989 and .933
@pytest.mark.parametrize(("references", "least"), [(500, 0.995), (100, 0.985)])
def test_a_sample_of_references_covers_what_the_whole_pool_does(references, least):
    points, gains, labelled = groups(2)
    nothing = covered(points, gains, labelled, [])
    whole, part = (
        covered(points, gains, labelled, herd(points, gains, labelled, 30, np.random.default_rng(0), count))
        for count in (2000, references)
    )
    assert part - nothing > least * (whole - nothing)


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_does_not_know_which_rows_are_references(seed):
    points, gains, labelled = groups(seed)
    rng = np.random.default_rng(seed)
    chosen = herd(points, gains, labelled, 200, rng, references=400)
    drawn = np.random.default_rng(seed).choice(2000, 400, replace=False)
    # hypergeometric: 40 of 200 in the mean; four deviations of sqrt(200 x .2 x .8 x 1800 / 1999) = 5.4
    deviation = np.sqrt(200 * 0.2 * 0.8 * 1800 / 1999)
    assert abs(np.isin(chosen, drawn).sum() - 40) < 4 * deviation


@pytest.mark.parametrize("references", [20, 399])
@pytest.mark.parametrize("seed", range(3))
def test_when_bounds_are_generous_a_few_references_choose_as_all_do(seed, references, monkeypatch):
    monkeypatch.setattr(facility_location, "DEVIATIONS", 100.0)  # whoever could be the best is summed over the pool
    points, gains, labelled = groups(seed, 400)
    whole = herd(points, gains, labelled, 50, np.random.default_rng(0), references=400)
    part = herd(points, gains, labelled, 50, np.random.default_rng(0), references)
    assert part.tolist() == whole.tolist()  # gains are distinct: there are no ties


@pytest.mark.parametrize("seed", range(3))
def test_when_bounds_are_generous_finer_samples_change_nothing(seed, monkeypatch):
    monkeypatch.setattr(facility_location, "DEVIATIONS", 100.0)
    points, gains, labelled = groups(seed, 400)
    whole = herd(points, gains, labelled, 50, np.random.default_rng(0), references=400)
    monkeypatch.setattr(facility_location, "_FINER", 2)
    assert len(facility_location.samples(400, 20, np.random.default_rng(0))) == 3
    assert herd(points, gains, labelled, 50, np.random.default_rng(0), references=20).tolist() == whole.tolist()


def test_finer_samples_spare_sums_and_cover_as_much(monkeypatch):
    points, gains, labelled = groups(2)
    radius_points, known = unit(points).astype(np.float32), unit(labelled).astype(np.float32)
    distances = facility_location.nearest(radius_points, known)
    found = {}
    for finer in (2, 2000):
        monkeypatch.setattr(facility_location, "_FINER", finer)
        drawn = facility_location.samples(2000, 50, np.random.default_rng(0))
        objective = facility_location.FacilityLocation(radius_points, gains, distances, float(np.median(distances)))
        order = np.random.default_rng(1).permutation(2000)
        chosen = facility_location.greedy(objective, objective.bounds(*drawn), False, 30, order)
        found[finer] = covered(points, gains, labelled, chosen), objective.looked_at, len(drawn)
    nothing = covered(points, gains, labelled, [])
    (fine, fine_sums, fine_samples), (coarse, coarse_sums, coarse_samples) = found[2], found[2000]
    assert (fine_samples, coarse_samples) == (4, 1)
    assert fine_sums < 0.8 * coarse_sums
    assert fine - nothing > 0.99 * (coarse - nothing)


def test_samples_lie_in_each_other_and_are_drawn_alike(frequency_bound):
    drawn = facility_location.samples(4000, 100, np.random.default_rng(0))
    assert [len(rows) for rows in drawn] == [100, 800]
    assert all(np.array_equal(rows, np.unique(rows)) for rows in drawn)
    assert np.isin(drawn[0], drawn[1]).all()
    assert [len(rows) for rows in facility_location.samples(90, 100, np.random.default_rng(0))] == [90]
    draws = 2000
    counts = sum(
        np.bincount(facility_location.samples(128, 4, np.random.default_rng(n))[1], minlength=128) for n in range(draws)
    )
    assert np.abs(counts / draws - 0.25).max() < frequency_bound(0.25, draws, 128)


def test_without_room_for_similarities_the_choice_is_the_same(monkeypatch):
    points, gains, labelled = groups(6, 400)
    roomy = herd(points, gains, labelled, 50, np.random.default_rng(0), references=40)
    monkeypatch.setattr(facility_location, "_KEPT", 100)
    assert herd(points, gains, labelled, 50, np.random.default_rng(0), references=40).tolist() == roomy.tolist()


def test_bounds_are_exact_with_all_rows_and_right_in_the_mean_with_some():
    points, gains, labelled = groups(7, 300)
    points, labelled = unit(points).astype(np.float32), unit(labelled).astype(np.float32)
    distances = facility_location.nearest(points, labelled)
    radius = float(np.median(distances))

    def objective():
        return facility_location.FacilityLocation(points, gains, distances, radius)

    near = np.exp(-((points[:, None] - points[None]).astype(np.float64) ** 2).sum(axis=2) / radius)
    exact = np.maximum(near - np.exp(-distances / radius)[None], 0) @ gains
    np.testing.assert_allclose(objective().bounds(np.arange(300)), exact, rtol=1e-4)
    np.testing.assert_allclose(objective().added(np.arange(300)), exact, rtol=1e-4)
    rng, draws = np.random.default_rng(0), 300
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(facility_location, "DEVIATIONS", 0.0)
        found = np.stack([objective().bounds(np.sort(rng.choice(300, 60, replace=False))) for _ in range(draws)])
    error = found.std(axis=0, ddof=1) / np.sqrt(draws)
    # 300 means, each within its own 4.5 errors but for one in 500 sets of this size
    assert (np.abs(found.mean(axis=0) - exact) < 4.5 * error + 1e-4 * exact).all()


def test_points_that_cover_nothing_but_themselves_come_by_their_gains():
    points, gains = np.eye(60), np.linspace(0.1, 1, 60)
    order = herd(points, gains, 0.2 + np.eye(60)[:1], 60, np.random.default_rng(3), references=5)
    assert sorted(order) == list(range(60))
    alone = order[order != 0]  # the first is near what is labelled
    assert np.all(np.diff(gains[alone]) < 0)


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
