"""Strategies that compare examples with each other, or need all gains at once, in the driver's memory.

The score phase keeps the embeddings, and the logits where the strategy reads them, of the candidates: all examples while
they are at most `CANDIDATES`, a random part of a larger pool. What is labelled counts as covered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distilbeam.pipelines.acquisition.score import read_candidates, read_gains, unbought_rows
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.selection.strategies.selectors import CandidatePool, Selector

CANDIDATES = 262_144
_A_BUDGET = 4  # candidates for each label to buy, where that is more
KEPT = ("embeddings", "logits")  # what a strategy may read that is kept for candidates alone

Chosen = tuple[Unit, npt.NDArray[np.int64], npt.NDArray[np.float32] | None, npt.NDArray[np.float64]]


def candidates_share(left: int, budget: int) -> float:
    """Return the share of `left` examples to take as candidates for `budget` labels."""
    return min(1.0, max(CANDIDATES, _A_BUDGET * budget) / left)


def chosen_in_memory(
    strategy: Selector,
    units: Sequence[Unit],
    gains: Path,
    candidates: Path,
    labelled: Callable[[], npt.NDArray[np.float32]] | None,
    bought: tuple[str, ...],
    budget: int,
    rng: np.random.Generator,
) -> Iterator[Chosen]:
    """Choose examples with a strategy that sees them all.

    Args:
      strategy: reads nothing but gains and what is in `KEPT`.
      units: the pool's units, in order.
      gains: directory of the gains files of the score phase.
      candidates: directory of the candidates' embeddings and logits.
      labelled: gives float32 [m, d], embeddings of what has a label.
      bought: picks directories of earlier rounds.
      budget: labels to buy.
      rng: the strategy's generator, derived from seed, round and method, so that a lost choice is made again alike.

    Yields:
      The units of which something was chosen, with the chosen rows, ascending, their gains (None where nothing was
      scored) and the probabilities with which they were chosen, 1 where the strategy takes the best.

    Raises:
      ValueError: fewer candidates than the budget.
    """
    kept = [name for name in KEPT if name in strategy.reads]
    rows, values, seen = [], [], []
    for unit in units:
        where, columns = read_candidates(candidates, unit, kept) if kept else (None, {})
        if strategy.reads:
            scored, all_gains = read_gains(gains, unit)
            where = scored if where is None else where
            values.append(all_gains[np.searchsorted(scored, where)])
        rows.append(unbought_rows(unit, bought) if where is None else where)
        seen.append(columns)
    sizes = [len(part) for part in rows]
    if budget > sum(sizes):
        raise ValueError(
            f"selection.budget must be at most the {sum(sizes):,} candidates that are compared with each other, got {budget:,}"
        )
    pool = CandidatePool(
        sum(sizes),
        labelled_embeddings=labelled() if labelled is not None and "embeddings" in kept else None,
        gains=np.concatenate(values) if values else None,
        # a unit without a candidate does not know how wide the others' are
        **{name: np.concatenate([part[name] for part in seen if len(part[name])]) for name in kept},
    )
    chosen = strategy.select(pool, budget, rng)
    drawn = strategy.probabilities(pool, budget)
    probabilities = np.ones(pool.size) if drawn is None else drawn
    ends = np.cumsum(sizes)[:-1]
    gains_of: Sequence[npt.NDArray[np.float32] | None] = values or [None] * len(rows)
    parts = zip(units, rows, np.split(chosen, ends), np.split(probabilities, ends), gains_of, strict=True)
    for unit, where, mine, probability, gain in parts:
        if mine.any():
            yield unit, where[mine], None if gain is None else gain[mine], probability[mine]
