"""Cross-validation: every row is judged by a model that has not learned it, although all rows are learned by some model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def folds(rows: int, count: int, seed: int) -> list[Indices]:
    """Deal rows out by chance into folds whose sizes differ by one at most.

    Args:
      rows: how many there are.
      count: number of folds, at least 2 and at most `rows`.
      seed: decides who is where.

    Returns:
      Ascending row numbers of each fold.

    Raises:
      ValueError: `count` is out of range.
    """
    if not 2 <= count <= rows:
        raise ValueError(f"folds must be at least 2 and at most the {rows:,} rows, got {count:,}")
    order = np.random.default_rng([seed, rows, count]).permutation(rows)
    return [np.sort(part) for part in np.array_split(order, count)]


def held_out_logits(
    logits: Callable[[int, Indices], npt.NDArray[np.floating]], parts: list[Indices]
) -> npt.NDArray[np.float32]:
    """Join what each model says of the rows that it has not learned.

    Args:
      logits: of a model's number and rows, [rows, C].
      parts: the fold that each model has not learned.

    Returns:
      float32 [rows of all folds, C], in the rows' order.
    """
    said = np.concatenate([np.asarray(logits(number, rows), np.float32) for number, rows in enumerate(parts)])
    joined = np.empty_like(said)
    joined[np.concatenate(parts)] = said
    return joined
