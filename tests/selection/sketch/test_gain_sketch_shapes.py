"""Ten million gains of every shape: one pass, refinement, and exactly the budget chosen in shards."""

from __future__ import annotations

import numpy as np
import pytest

from distilbeam.selection.games.rad import rad_marginals
from distilbeam.selection.rounding import dep_round, round_carries, round_shard, shard_rng
from distilbeam.selection.sketch.gain_sketch import GainSketch

SIZE = 10_000_000
SHARDS = 7


def lognormal(rng):
    return np.exp(rng.normal(0, 12 * np.log(10) / 6, SIZE)).astype(np.float32)  # six deviations are twelve decades


def half_zero_uniform(rng):
    return np.where(rng.random(SIZE, np.float32) < 0.1, rng.random(SIZE, np.float32), np.float32(0))


SHAPES = {
    "uniform": lambda rng: rng.random(SIZE, np.float32),
    "beta margins": lambda rng: (1 - rng.beta(5, 1, SIZE)).astype(np.float32),
    "mass near zero": lambda rng: rng.beta(0.05, 3, SIZE).astype(np.float32),
    "ties": lambda rng: rng.choice(np.array([0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0], np.float32), SIZE),
    "nine tenths zeros": half_zero_uniform,
    "lognormal": lognormal,
}


@pytest.mark.slow
@pytest.mark.parametrize(("wrong_share", "budget_share"), [(0.1, 0.05), (0.02, 0.6)])
@pytest.mark.parametrize("shape", SHAPES)
def test_ten_million_gains(shape, wrong_share, budget_share):
    gains = SHAPES[shape](np.random.default_rng(7))
    positive = int(np.count_nonzero(gains))
    wrong, budget = wrong_share * positive, int(budget_share * positive)
    exact = rad_marginals(gains, wrong, budget)
    assert exact.value > 0
    parts = np.array_split(gains, SHARDS)

    sketch = GainSketch()
    for part in parts:
        sketch.add(part)
    rough = sketch.solve(wrong, budget)
    assert abs(rough.value / exact.value - 1) < 1e-4
    assert sum(rough.marginals(part).sum() for part in parts) == pytest.approx(budget, abs=1e-6)

    refined, refinement = rough, rough.refinement()
    if refinement is not None:  # among few distinct gains no bin may need it
        for part in parts:
            refinement.add(part)
        refined = refinement.solve()
    assert refined.refinement() is None
    assert abs(refined.value / exact.value - 1) < 1e-9
    marginals = [refined.marginals(part) for part in parts]
    # The fixed-point reciprocals differ by 2e-10; their sum over the pool ends up in the point at the cut.
    assert np.abs(np.concatenate(marginals) - exact.probabilities).sum() < 1e-9 * budget

    chosen, carries = 0, []
    for number, shard in enumerate(marginals):
        selected, carry, probability = round_shard(shard, shard_rng(0, 0, str(number)))
        chosen += int(selected.sum())
        if carry >= 0:
            carries.append(probability)
    chosen += int(round_carries(carries, shard_rng(0, 0, "carries")).sum())
    assert chosen == budget


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["ties", "lognormal"])
def test_one_rounding_of_ten_million(shape):
    gains = SHAPES[shape](np.random.default_rng(8))
    sketch = GainSketch()
    sketch.add(gains)
    threshold = sketch.solve(0.05 * SIZE, SIZE // 3)
    assert dep_round(threshold.marginals(gains), np.random.default_rng(0)).sum() == SIZE // 3
