"""The registry of strategies: one set of names and gains, whoever asks."""

from __future__ import annotations

import numpy as np
import pytest

from distilbeam.selection.gains import GAINS, gain_named
from distilbeam.selection.strategies.registry import (
    STRATEGIES,
    gain_read,
    names,
    selector,
    selector_with,
    strategy_class,
)
from distilbeam.selection.strategies.selectors import CandidatePool

FIELDS = {"gains", "logits", "embeddings", "errors", "caps"}
LOGITS = np.random.default_rng(0).normal(size=(50, 4))


@pytest.mark.parametrize("name", names())
def test_a_strategy_is_given_nothing_but_what_it_says_it_reads(name: str) -> None:
    rng, rates = np.random.default_rng(1), np.full(50, 0.2)
    known = {"logits": LOGITS, "embeddings": rng.normal(size=(50, 3)), "errors": rates, "caps": 2 * rates}
    known["gains"] = gain_named("margin")(LOGITS)
    reads = strategy_class(name).reads
    assert set(reads) <= FIELDS
    pool = CandidatePool(50, **{field: known[field] for field in reads})
    assert selector(name).select(pool, 7, rng).sum() == 7
    for left_out in reads:
        some = CandidatePool(50, **{field: known[field] for field in reads if field != left_out})
        with pytest.raises(ValueError, match="must be given for the selector"):
            selector(name).select(some, 7, rng)


@pytest.mark.parametrize("name", ["uniform", "rad", "rad-loss", "rad-capped"])
def test_probabilities_are_those_of_the_draws(name: str) -> None:
    rates = np.full(50, 0.2)
    pool = CandidatePool(50, LOGITS, errors=rates, caps=2 * rates)
    strategy, rng = selector(name), np.random.default_rng(2)
    expected, draws = strategy.probabilities(pool, 9), 4_000
    assert expected is not None
    assert expected.sum() == pytest.approx(9)
    seen = sum(strategy.select(pool, 9, rng).astype(int) for _ in range(draws)) / draws
    # Hoeffding over 50 examples: P(any deviates by more than t) <= 100 exp(-2 n t^2) = 1e-9
    assert (np.abs(seen - expected) < np.sqrt(np.log(100 / 1e-9) / (2 * draws))).all()


def test_a_gain_is_one_thing_under_both_spellings() -> None:
    for name in GAINS:
        assert gain_named(name.replace("_", "-")) is gain_named(name) is GAINS[name]
        assert name.replace("_", "-") in names()
        assert gain_read(name, "margin").replace("-", "_") == name  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"^gain must be one of margin, entropy, least_confidence, got 'size'$"):
        gain_named("size")


def test_gains_that_are_known_are_not_computed_again() -> None:
    gains = np.arange(50.0)
    chosen = selector("greedy").select(CandidatePool(50, gains=gains), 3, np.random.default_rng(0))
    assert np.flatnonzero(chosen).tolist() == [47, 48, 49]
    with pytest.raises(ValueError, match="gains"):
        selector("greedy").select(CandidatePool(51, gains=gains), 3, np.random.default_rng(0))


def test_which_gain_a_pool_is_scored_by() -> None:
    assert [gain_read(name, "entropy") for name in ("uniform", "greedy", "rad", "herding", "k-center", "margin")] == [
        None,
        "entropy",
        "entropy",
        "entropy",
        "entropy",
        "margin",
    ]


def test_options_that_are_offered_are_taken_where_they_fit() -> None:
    offered = {"wrong": 7.0, "gain": "entropy", "limit": None}
    made = [vars(selector_with(name, **offered)) for name in ("rad", "greedy", "k_center", "uniform", "entropy")]
    assert made == [{"wrong": 7.0, "gain": "entropy"}, {"gain": "entropy"}, {"limit": None}, {}, {"gain": "entropy"}]
    with pytest.raises(ValueError, match=r"^the selector uniform does not take all of the options wrong$"):
        selector("uniform", wrong=3)


def test_every_line_of_the_registry_leads_to_the_class_of_that_name() -> None:
    assert {name: strategy_class(name).name for name in STRATEGIES} == {name: name for name in STRATEGIES}


def test_what_is_no_strategy_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^selector must name a subclass of distilbeam.selection.Selector, got json:dumps$"
    ):
        selector("json:dumps")
    with pytest.raises(ValueError, match=r"^selector: module 'no_such_module' is not installed"):
        selector("no_such_module:Mine")
