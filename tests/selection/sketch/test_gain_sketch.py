"""The distributed form: merging, the expected size, the exact value after refinement, serialisation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distilbeam.selection.games.rad import guaranteed_gain, rad_marginals
from distilbeam.selection.sketch.bins import reciprocals
from distilbeam.selection.sketch.gain_sketch import GainSketch, Threshold
from distilbeam.selection.sketch.refinement import Refinement

EXAMPLES = settings(max_examples=300, deadline=None, derandomize=True)
GAIN = st.one_of(
    st.floats(2**-20, 10.0, width=32),
    st.sampled_from([0.0, 0.25, 0.3, 1.0, 1.001, 1.002]),
    st.integers(-120, 120).map(lambda e: float(2.0**e)),
)
POOLS = st.lists(GAIN, min_size=1, max_size=60).map(lambda values: np.array(values, np.float32))


def sketch_of(gains):
    sketch = GainSketch()
    sketch.add(gains)
    return sketch


def refine(threshold, parts):
    """Refine until nothing changes; count the passes."""
    passes = 0
    while (refinement := threshold.refinement()) is not None:
        for part in parts:
            refinement.add(part)
        threshold, passes = refinement.solve(), passes + 1
        assert passes < 6
    return threshold, passes


@EXAMPLES
@given(gains=POOLS, share=st.one_of(st.just(0.0), st.floats(0, 1.1)), bought=st.floats(0, 1))
def test_exact_after_refinement(gains, share, bought):
    wrong, budget = share * len(gains), max(1, round(bought * len(gains)))
    exact = rad_marginals(gains, wrong, budget)
    rough = sketch_of(gains).solve(wrong, budget)
    # Nothing is further off than a bin is wide.
    assert rough.value == pytest.approx(exact.value, rel=2**-7, abs=1e-9 * budget * float(gains.max()))
    refined, _ = refine(rough, [gains[: len(gains) // 2], gains[len(gains) // 2 :]])
    for threshold in (rough, refined):
        marginals = threshold.marginals(gains)
        assert marginals.sum() == pytest.approx(budget, rel=1e-12)
        assert marginals.min() >= 0
        assert marginals.max() <= 1
    scale = budget * float(gains.max())
    assert refined.exact
    assert refined.value == pytest.approx(exact.value, rel=1e-9, abs=1e-12 * scale)
    assert guaranteed_gain(gains, marginals, wrong) == pytest.approx(exact.value, rel=2e-9, abs=1e-9 * scale)
    assert refined.fallback == exact.fallback


@EXAMPLES
@given(gains=POOLS, seed=st.integers(0, 1000))
def test_merging_in_random_trees_is_exact(gains, seed):
    rng = np.random.default_rng(seed)
    pieces = [sketch_of(part) for part in np.array_split(rng.permutation(gains), rng.integers(1, 9))]
    while len(pieces) > 1:
        rng.shuffle(pieces)
        last = pieces.pop()
        pieces[0].merge(GainSketch.from_bytes(last.to_bytes()) if rng.random() < 0.5 else last)
    whole = sketch_of(gains)
    assert pieces[0] == whole
    assert pieces[0].solve(1, 1) == whole.solve(1, 1)
    assert (whole.count, whole.positive) == (len(gains), np.count_nonzero(gains))


def test_random_trees_of_many_gains_and_refinements():
    rng = np.random.default_rng(0)
    gains = rng.beta(0.3, 2, 200_000).astype(np.float32)
    parts = np.array_split(gains, np.sort(rng.integers(0, len(gains), 40)))
    whole = sketch_of(gains)
    threshold = whole.solve(2e4, 10_000)
    in_order = threshold.refinement()
    in_order.add(gains)
    for seed in range(3):
        order = np.random.default_rng(seed)
        sketches, refinements = [sketch_of(part) for part in parts], []
        for part in parts:
            refinement = threshold.refinement()
            refinement.add(part)
            refinements.append(refinement)
        for pieces in (sketches, refinements):
            while len(pieces) > 1:
                order.shuffle(pieces)
                pieces[-2].merge(pieces.pop())
        assert sketches[0] == whole
        assert sketches[0].to_bytes() == whole.to_bytes()
        assert refinements[0].to_bytes() == in_order.to_bytes()
        assert refinements[0].solve() == in_order.solve()


@pytest.mark.parametrize(
    ("wrong", "budget"), [(2_000, 1_000), (0, 7_000), (5_000, 12_000), (300, 19_000), (12_000, 19_999)]
)
def test_refinement_travels_as_bytes(wrong, budget):
    gains = np.random.default_rng(1).beta(2, 2, 20_000).astype(np.float32)
    threshold = sketch_of(gains).solve(wrong, budget)
    left, right = threshold.refinement(), Refinement.from_bytes(threshold.refinement().to_bytes())
    left.add(gains[:5_000])
    right.add(gains[5_000:])
    left.merge(Refinement.from_bytes(right.to_bytes()))
    refined = left.solve()
    exact = rad_marginals(gains, wrong, budget)
    assert refined.exact
    assert refined.value == pytest.approx(exact.value, rel=1e-9)
    # The fixed-point reciprocals differ by 2e-10; their sum over the pool ends up in the point at the cut.
    assert np.abs(refined.marginals(gains) - exact.probabilities).sum() < 1e-9 * budget


def test_threshold_survives_json():
    gains = np.random.default_rng(2).random(5_000, np.float32)
    for budget in (3, 400, 4_000, 5_000):
        threshold, _ = refine(sketch_of(gains).solve(100.5, budget), [gains])
        copy = Threshold.from_json(json.loads(json.dumps(threshold.to_json())))
        assert copy == threshold
        assert copy.refinement() is None
        np.testing.assert_array_equal(copy.marginals(gains), threshold.marginals(gains))


def test_marginals_follow_the_shape_of_the_optimum():
    gains = np.array([5, 4, 3, 2, 1, 0.5], np.float32)
    threshold, _ = refine(sketch_of(gains).solve(2, 4), [gains])
    np.testing.assert_allclose(threshold.marginals(gains), [3 / 5, 3 / 4, 1, 1, 13 / 20, 0], rtol=1e-9)
    assert threshold.value == pytest.approx(113 / 20, rel=1e-9)
    assert threshold.level == pytest.approx(3, rel=1e-9)


@pytest.mark.parametrize(("wrong", "budget"), [(2_922, 4_563), (2_266, 3_033)])
def test_gains_of_the_bin_that_holds_the_level_share_their_mean(wrong, budget):
    gains = np.random.default_rng(3).random(5_000).astype(np.float32)
    rough = sketch_of(gains).solve(wrong, budget)
    inside = (gains >= rough.straddle_from) & (gains < rough.share_from)
    assert gains[inside].min() < rough.level < gains[inside].max()
    np.testing.assert_allclose(rough.marginals(gains)[inside], rough.straddle)
    assert rough.marginals(gains).sum() == pytest.approx(budget, rel=1e-13)
    assert rough.value == pytest.approx(rad_marginals(gains, wrong, budget).value, rel=1e-4)


def test_reciprocals_are_the_sketchs():
    rng = np.random.default_rng(0)
    gains = np.exp(rng.uniform(-80, 80, 100_000)).astype(np.float32)
    np.testing.assert_allclose(reciprocals(gains) * gains.astype(float), 1, atol=2.4e-10)
    single = np.float32(0.3)
    sketch = sketch_of(np.full(70_000, single))
    number = int(single.view(np.uint32)) >> 16
    low = float(np.uint32(number << 16).view(np.float32))
    total = (sketch.counts[number] - sketch.deficits[number] * 2.0**-31) / low
    assert total == pytest.approx(70_000 * reciprocals(np.array([single]))[0], rel=1e-15)


def test_gains_without_value_share_what_is_left():
    gains = np.array([0.0, 1e-40, 2.0, 3.0, -0.0], np.float32)
    sketch = sketch_of(gains)
    assert (sketch.count, sketch.positive) == (5, 2)
    np.testing.assert_allclose(sketch.solve(0, 4).marginals(gains), [2 / 3, 2 / 3, 1, 1, 2 / 3])
    by_chance = sketch.solve(2, 3)
    assert by_chance.fallback == "uniform over the pool: 2 wrong labels can cover all 2 positive gains"
    assert (by_chance.value, by_chance.refinement()) == (0, None)
    np.testing.assert_allclose(by_chance.marginals(gains), 3 / 5)


def test_empty_parts_and_lists():
    sketch = GainSketch()
    sketch.add([])
    assert sketch.count == 0
    assert repr(sketch) == "GainSketch(count=0, positive=0)"
    sketch.add([1, 2])
    assert GainSketch.from_bytes(sketch.to_bytes()) == sketch
    assert sketch.solve(0, 1).marginals([]).shape == (0,)
    assert sketch != GainSketch()
    assert sketch != "sketch"
    twin = sketch.copy()
    twin.add([1.0])
    assert sketch.count == 2


@pytest.mark.parametrize(
    ("gains", "message"),
    [
        ([1.0, -1.0], "gains must be finite and at least 0, got -1.0 at index 1"),
        ([np.nan], "gains must be finite and at least 0, got nan at index 0"),
        (np.array([1.0, np.inf], np.float32), "gains must be finite and at least 0, got inf at index 1"),
        ([1e39], r"gains must fit float32 \(at most 3.4e38\), got 1e\+39; divide them by a constant"),
        ([[1.0]], r"gains must have one dimension, one value per example, got shape \(1, 1\)"),
    ],
)
def test_bad_gains_are_named_and_nothing_is_added(gains, message):
    sketch = GainSketch()
    for reject in (sketch.add, sketch_of([1.0]).solve(0, 1).marginals):
        with pytest.raises(ValueError, match=f"^{message}$"):
            reject(gains)
    assert sketch == GainSketch()


def test_misuse_is_named():
    gains = np.linspace(0.1, 1, 1000, dtype=np.float32)
    sketch = sketch_of(gains)
    with pytest.raises(ValueError, match=r"^gains must be added to the sketch before it is solved, got none$"):
        GainSketch().solve(0, 1)
    with pytest.raises(ValueError, match=r"^budget must be at most the 1,000 unlabelled examples, got 1,001$"):
        sketch.solve(0, 1001)
    with pytest.raises(ValueError, match=r"^wrong must be a finite number of wrong labels, at least 0, got -1$"):
        sketch.solve(-1, 1)
    with pytest.raises(ValueError, match=r"^data must be the bytes of GainSketch.to_bytes, got 3 bytes that are not$"):
        GainSketch.from_bytes(b"abc")
    with pytest.raises(ValueError, match=r"^data must be the bytes of GainSketch.to_bytes, got "):
        GainSketch.from_bytes(sketch.to_bytes()[:-1])
    threshold = sketch.solve(100, 50)
    with pytest.raises(
        ValueError, match=r"^refinement must be given every gain of the sketched pool exactly once; of the "
    ):
        threshold.refinement().solve()
    twice = threshold.refinement()
    twice.add(gains)
    twice.add(gains)
    with pytest.raises(ValueError, match=r"exactly once"):
        twice.solve()
    with pytest.raises(ValueError, match=r"^refinements must be of the same threshold to be merged"):
        threshold.refinement().merge(sketch.solve(200, 50).refinement())
    with pytest.raises(ValueError, match=r"^data must be the bytes of Refinement.to_bytes, got 4 bytes that are not$"):
        Refinement.from_bytes(b"DBR1")
    with pytest.raises(ValueError, match=r"^refinement must be asked of a threshold that GainSketch.solve returned"):
        Threshold.from_json(threshold.to_json()).refinement()
    with pytest.raises(ValueError, match=r"missing or unknown: level, levels$"):
        Threshold.from_json({("levels" if k == "level" else k): v for k, v in threshold.to_json().items()})
