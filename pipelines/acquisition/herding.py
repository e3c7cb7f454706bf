"""Choosing by uncertainty herding: examples are compared with each other, in the driver's memory.

The score phase keeps the embeddings of the candidates: all examples while they are at most `CANDIDATES`, a random part of a
larger pool. What is labelled counts as covered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distilbeam.pipelines.acquisition.score import read_embeddings, read_gains
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.selection.strategies.herding import herd

CANDIDATES = 262_144
_A_BUDGET = 4  # candidates for each label to buy, where that is more


def candidates_share(left: int, budget: int) -> float:
    """Return the share of `left` examples to take as candidates for `budget` labels."""
    return min(1.0, max(CANDIDATES, _A_BUDGET * budget) / left)


def herded(
    units: Sequence[Unit],
    gains: Path,
    embeddings: Path,
    labelled: npt.NDArray[np.float32],
    budget: int,
    rng: np.random.Generator,
) -> Iterator[tuple[Unit, npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Choose examples; see `selection.herding.herd`.

    Args:
      units: the pool's units, in order.
      gains: directory of the gains.
      embeddings: directory of the candidates' embeddings.
      labelled: float32 [m, d], embeddings of what has a label.
      budget: labels to buy.
      rng: source of randomness.

    Yields:
      The units of which something was chosen, with the chosen rows, ascending, and their gains.

    Raises:
      ValueError: fewer candidates than the budget.
    """
    rows, values, points = [], [], []
    for unit in units:
        where, seen = read_embeddings(embeddings, unit)
        all_rows, all_gains = read_gains(gains, unit)
        rows.append(where)
        values.append(all_gains[np.searchsorted(all_rows, where)])
        points.append(seen)
    sizes = [len(part) for part in rows]
    if budget > sum(sizes):
        raise ValueError(
            f"selection.budget must be at most the {sum(sizes):,} candidates that are compared with each other, got {budget:,}"
        )
    held = np.concatenate([part for part in points if len(part)])
    chosen = np.zeros(sum(sizes), bool)
    chosen[herd(held, np.concatenate(values).astype(np.float64), labelled, budget, rng)] = True
    for unit, where, gain, mine in zip(units, rows, values, np.split(chosen, np.cumsum(sizes)[:-1]), strict=True):
        if mine.any():
            yield unit, where[mine], gain[mine]
