"""An embedding table by ridge regression: bags of n-grams come to lie where a sentence encoder puts their texts.

    minimise over W:   sum_i |x_i W - P (y_i - mean)|^2 + ridge s |W|^2

with x_i the bag of row i as the network weighs it [V], y_i the encoder's vector [m], P its first `dim` principal components, and
s the mean square of the numbers in a bag that are not 0: `ridge` counts in rows, an n-gram that stands in as many is believed by
half. The normal equations are solved by conjugate gradients, a column of W each, which need sums over the rows alone: the rows are
read once for every step, a batch at a time, and what is held is five tables of V x dim numbers, however many rows there are.
n-grams that no row has keep 0. `scaled` gives bags the mean square that random weights would give them: a student learns as from
those, and the next layer's weights need no other scale.

References:
  Hestenes and Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, 1952. Regressing a bag of words on a sentence
  encoder before it learns classes is this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from scipy import sparse

from distilbeam.storage.atomic import replacing

Floats = npt.NDArray[np.float64]
Bags = Callable[[], Iterator[sparse.csr_matrix]]
Pairs = Callable[[], Iterator[tuple[sparse.csr_matrix, npt.NDArray[np.floating]]]]


def regressed_table(
    bags: Bags, pairs: Pairs, dim: int, ridge: float, tolerance: float = 1e-4, steps: int = 200
) -> Floats:
    """Fit the table, unscaled.

    Args:
      bags: gives the rows anew at every call: batches of bags [B, V].
      pairs: the same with the encoder's vectors [B, m].
      dim: columns of the table; those beyond m are 0.
      ridge: > 0, in rows.
      tolerance: of the residual's norm beside that of the right side, in every column.
      steps: at most so many.

    Returns:
      float64 [V, dim].

    Raises:
      ValueError: there are no rows, or vectors that are not finite.
    """
    components, mean, mean_square = _components(pairs, dim)
    right = _sum(x.T @ ((np.asarray(y, np.float64) - mean) @ components) for x, y in pairs())
    penalty = ridge * mean_square

    def normal(direction: Floats) -> Floats:
        return np.asarray(_sum(x.T @ (x @ direction) for x in bags()) + penalty * direction)

    table, residual = np.zeros_like(right), right
    direction, squares = residual, (residual**2).sum(axis=0)
    enough = tolerance**2 * squares
    for _ in range(steps):
        if (squares <= enough).all():
            break
        image = normal(direction)
        curvature = (direction * image).sum(axis=0)
        # a column that is solved has nothing left to divide by
        step = np.divide(squares, curvature, out=np.zeros_like(squares), where=curvature > 0)
        table, residual = table + step * direction, residual - step * image
        before, squares = squares, (residual**2).sum(axis=0)
        direction = residual + np.divide(squares, before, out=np.zeros_like(squares), where=before > 0) * direction
    return np.pad(table, ((0, 0), (0, dim - table.shape[1])))


def scaled(table: Floats, bags: Bags) -> npt.NDArray[np.float32]:
    """Scale a table so that a number of a bag has the mean square that independent weights of variance 1 would give it.

    Args:
      table: [V, dim], not 0 everywhere.
      bags: the rows; see `regressed_table`.

    Returns:
      float32 [V, dim].
    """
    mine = _sum(np.square(x @ table).sum() for x in bags()) / table.shape[1]
    wanted = _sum(np.square(x.data).sum() for x in bags())
    return np.asarray(table * np.sqrt(wanted / mine), np.float32)


def id_bags(ids: npt.NDArray[np.int64], padding: int, vocabulary: int) -> sparse.csr_matrix:
    """Give the bags of rows of ids [B, L]: the share of each id among those that are not padding."""
    there = ids != padding
    lengths = there.sum(axis=1)
    shares = np.repeat(1 / np.maximum(lengths, 1), lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    found = sparse.csr_matrix((shares, ids[there], starts), shape=(len(ids), vocabulary))
    found.sum_duplicates()
    return found


def vector_bags(numbers: npt.NDArray[np.floating]) -> sparse.csr_matrix:
    """Give the bags of rows that are weights of buckets already [B, V]."""
    return sparse.csr_matrix(np.asarray(numbers, np.float64))


def write_table(path: Path, table: npt.NDArray[np.float32]) -> None:
    """Write a table, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file({"embedding": np.ascontiguousarray(table)}, temporary)


def read_table(path: str | Path) -> npt.NDArray[np.float32]:
    """Read a table, float32 [V, dim]."""
    return np.asarray(load_file(path)["embedding"])


def _components(pairs: Pairs, dim: int) -> tuple[Floats, Floats, float]:
    """Give the vectors' first principal components [m, min(dim, m)], their mean, and s."""
    rows, numbers, squares = 0, 0, 0.0
    total: Floats | None = None
    products: Floats | None = None
    for x, y in pairs():
        if not np.isfinite(y).all():
            raise ValueError("the encoder's vectors must be finite, some are not")
        some = np.asarray(y, np.float64)
        total = some.sum(axis=0) if total is None else total + some.sum(axis=0)
        products = some.T @ some if products is None else products + some.T @ some
        rows, numbers, squares = rows + len(some), numbers + x.nnz, squares + float(np.square(x.data).sum())
    if total is None or products is None or not numbers:
        raise ValueError("there must be texts with words to fit an embedding table to, there are none")
    mean = total / rows
    _, vectors = np.linalg.eigh(products - rows * np.outer(mean, mean))
    return np.asarray(vectors[:, ::-1][:, :dim]), mean, squares / numbers


def _sum(parts: Iterable[Any]) -> Floats:
    return np.asarray(reduce(np.add, parts), np.float64)
