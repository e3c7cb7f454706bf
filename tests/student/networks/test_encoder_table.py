"""Embedding tables by ridge regression on an encoder's vectors: the closed form, the scale, and the network that starts there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from distilbeam.student.networks.bag import start_from_table
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.networks.encoder_table import (
    id_bags,
    read_table,
    regressed_table,
    scaled,
    vector_bags,
    write_table,
)

ROWS, BUCKETS, WIDTH, DIM, PAD = 300, 40, 9, 5, 0
READS = {"kind": "text", "columns": ["t"], "buckets": BUCKETS, "ngram_form": "ids", "max_length": 8}


@pytest.fixture
def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, BUCKETS - 1, (ROWS, 8)) * (rng.random((ROWS, 8)) < 0.7)  # id 39 stands nowhere
    meaning = rng.normal(size=(BUCKETS, WIDTH))
    return ids, meaning[ids].sum(axis=1) + 0.3 * rng.normal(size=(ROWS, WIDTH)) + 2.0


def batches(ids: np.ndarray, vectors: np.ndarray, size: int) -> Iterator[tuple[sparse.csr_matrix, np.ndarray]]:
    for start in range(0, len(ids), size):
        yield id_bags(ids[start : start + size], PAD, BUCKETS), vectors[start : start + size]


def table_of(ids: np.ndarray, vectors: np.ndarray, size: int, ridge: float, dim: int = DIM) -> np.ndarray:
    def bags() -> Iterator[sparse.csr_matrix]:
        return (x for x, _ in batches(ids, vectors, size))

    return regressed_table(bags, lambda: batches(ids, vectors, size), dim, ridge, tolerance=1e-10)


def test_bags_are_shares_of_the_ids_that_are_no_padding() -> None:
    found = id_bags(np.array([[3, 3, 1, PAD], [PAD] * 4, [2, PAD, PAD, PAD]]), PAD, 5).toarray()
    np.testing.assert_allclose(found, [[0, 1 / 3, 0, 2 / 3, 0], [0] * 5, [0, 0, 1, 0, 0]])


@pytest.mark.parametrize("size", [ROWS, 37])
@pytest.mark.parametrize("ridge", [0.5, 20.0])
def test_the_table_solves_the_normal_equations_in_float64(
    data: tuple[np.ndarray, np.ndarray], size: int, ridge: float
) -> None:
    ids, vectors = data
    x = np.zeros((ROWS, BUCKETS))  # an oracle of its own: dense, solved directly
    for row, some in enumerate(ids):
        words = some[some != PAD]
        np.add.at(x[row], words, 1 / max(len(words), 1))
    centred = vectors - vectors.mean(axis=0)
    _, _, right = np.linalg.svd(centred, full_matrices=False)
    penalty = ridge * (x**2).sum() / (x > 0).sum()
    expected = np.linalg.solve(x.T @ x + penalty * np.eye(BUCKETS), x.T @ (centred @ right[:DIM].T))
    found = table_of(ids, vectors, size, ridge)
    signs = np.sign((found * expected).sum(axis=0))  # of a principal component there are two
    np.testing.assert_allclose(found * signs, expected, rtol=1e-6, atol=1e-8)
    assert (found[39] == 0).all()
    assert (found[PAD] == 0).all()


def test_columns_beyond_the_encoders_width_are_zero(data: tuple[np.ndarray, np.ndarray]) -> None:
    found = table_of(*data, ROWS, 1.0, dim=12)
    assert found.shape == (BUCKETS, 12)
    assert (found[:, WIDTH:] == 0).all()
    assert np.abs(found[:, :WIDTH]).min(axis=0).shape == (WIDTH,)


def test_scaled_bags_have_the_mean_square_of_random_weights(data: tuple[np.ndarray, np.ndarray]) -> None:
    x = id_bags(data[0], PAD, BUCKETS)
    table = scaled(table_of(*data, ROWS, 1.0), lambda: iter([x]))
    # random weights: E (x w)^2 = |x|^2, whose mean over the rows is what bags of the table have
    assert np.square(x @ table).mean() == pytest.approx(np.square(x.toarray()).sum(axis=1).mean(), rel=1e-5)


def test_rows_without_words_or_with_odd_vectors_are_sentences(data: tuple[np.ndarray, np.ndarray]) -> None:
    ids, vectors = data
    with pytest.raises(ValueError, match="there must be texts with words"):
        table_of(np.zeros_like(ids), vectors, ROWS, 1.0)
    with pytest.raises(ValueError, match="vectors must be finite"):
        table_of(ids, np.full_like(vectors, np.nan), ROWS, 1.0)


@pytest.mark.parametrize("form", ["ids", "vector"])
def test_a_network_starts_with_the_bags_of_the_table(
    data: tuple[np.ndarray, np.ndarray], tmp_path: Path, form: str
) -> None:
    ids, vectors = data
    bags = id_bags(ids, PAD, BUCKETS)
    write_table(tmp_path / "a" / "table.safetensors", scaled(table_of(ids, vectors, ROWS, 1.0), lambda: iter([bags])))
    table = read_table(tmp_path / "a" / "table.safetensors")
    config = StudentConfig(kind="text", hidden=(), dim=DIM, input=READS | {"ngram_form": form})
    network = build_student(config, (8,) if form == "ids" else (BUCKETS,), 3)
    start_from_table(network, table)
    inputs = torch.from_numpy(ids) if form == "ids" else torch.from_numpy(bags.toarray().astype(np.float32))
    scale = 1.0 if form == "ids" else (3 * BUCKETS) ** -0.5
    np.testing.assert_allclose(network.features(inputs).detach().numpy(), scale * (bags @ table), rtol=1e-4, atol=1e-6)


def test_vectors_of_buckets_are_their_own_bags() -> None:
    numbers = np.array([[0.0, 0.5, 0, -0.5], [0, 0, 0, 0]])
    assert (vector_bags(numbers).toarray() == numbers).all()


def test_a_table_of_another_size_or_for_another_network_is_a_sentence() -> None:
    text = StudentConfig(kind="text", hidden=(), dim=DIM, input=READS)
    with pytest.raises(ValueError, match=r"the embedding table must be of \[40, 5\], got \[40, 6\]"):
        start_from_table(build_student(text, (8,), 3), np.zeros((BUCKETS, 6)))
    with pytest.raises(ValueError, match="for students of kind 'text', got Linear"):
        start_from_table(torch.nn.Linear(3, 3), np.zeros((BUCKETS, 6)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "encoder"}, "encoder must be given with init = 'encoder'"),
        ({"encoder": {"column": "v"}}, "encoder must be given with init = 'encoder', and only with it"),
        ({"init": "encoder", "encoder": {}}, "encoder must have folder or column, one of them"),
        ({"init": "encoder", "encoder": {"column": "v", "folder": "f"}}, "encoder must have folder or column"),
        (
            {"init": "encoder", "encoder": {"column": "v"}, "kind": "mlp"},
            "init = 'encoder' is for students of kind 'text'",
        ),
    ],
)
def test_settings_that_do_not_fit_are_sentences(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StudentConfig.model_validate({"kind": "text", "input": READS | {"ngram_form": "vector"}} | changes)
