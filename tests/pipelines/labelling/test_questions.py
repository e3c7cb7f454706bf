"""Digests of what rows ask, against sums of Python's whole numbers, and what makes two of them equal."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from distilbeam.pipelines.labelling.questions import question_digests
from distilbeam.pipelines.pool.content_ids import type_name

PRIME = 2**31 - 1


def by_whole_numbers(values: npt.NDArray[np.float32], kind: pa.DataType) -> list[tuple[int, ...]]:
    """Compute the four sums of the definition in Python's integers of any size."""

    def drawn(seed: bytes, words: int) -> list[list[int]]:
        bits = np.frombuffer(hashlib.shake_128(seed).digest(words * 16), "<u4").reshape(-1, 4)
        return [[int(number) for number in row] for row in bits >> 6]

    digest = hashlib.blake2b(type_name(kind).encode(), digest_size=16).digest()
    words = values.view("<u2").tolist()
    (constant,), factors = drawn(digest + b"types", 1), drawn(digest + (0).to_bytes(4, "little"), len(words[0]))
    return [
        tuple((constant[j] + sum(w * a[j] for w, a in zip(row, factors, strict=True))) % PRIME for j in range(4))
        for row in words
    ]


def vectors(values: npt.NDArray[np.float32]) -> pa.Table:
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])})


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (513, 7), (3, 512), (5, 513), (2, 1500)])
def test_digests_are_the_sums_modulo_the_prime(rows: int, width: int) -> None:
    values = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    table = vectors(values)
    found = question_digests(table, ["x"]).view("<u4").tolist()
    assert [tuple(row) for row in found] == by_whole_numbers(values, table.schema.field("x").type)


def test_the_largest_sums_are_exact() -> None:
    values = np.full((2, 512), np.frombuffer(b"\xff\xff\xff\xff", "<f4")[0], np.float32)  # a NaN: every word is 65,535
    table = vectors(values)
    found = question_digests(table, ["x"]).view("<u4").tolist()
    assert [tuple(row) for row in found] == by_whole_numbers(values, table.schema.field("x").type)


def test_equal_rows_have_equal_digests_in_any_block_and_any_encoding() -> None:
    values = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    many = np.tile(values, (50, 1))
    digests = question_digests(vectors(many), ["x"])
    assert (digests == np.tile(digests[:40], (50, 1))).all()
    assert len(np.unique(digests, axis=0)) == 40
    texts = pa.array(["a", "b", None, "a"])
    plain, coded = (question_digests(pa.table({"t": t}), ["t"]) for t in (texts, texts.dictionary_encode()))
    assert (plain == coded).all()
    assert (plain[0] == plain[3]).all()
    assert len(np.unique(plain, axis=0)) == 3


def test_missing_values_are_not_zeros_and_types_and_places_count() -> None:
    def digest(column: pa.Array) -> tuple[int, ...]:
        return tuple(question_digests(pa.table({"x": column}), ["x"])[0].tolist())

    whole = pa.list_(pa.float32(), 2)
    columns = [
        pa.array([0], pa.int64()), pa.array([None], pa.int64()), pa.array([0], pa.int32()), pa.array([0.0], pa.float64()),
        pa.array([[0.0, 0.0]], whole), pa.array([[0.0, None]], whole), pa.array([[None, 0.0]], whole), pa.array([None], whole),
        pa.array(["0"]), pa.array([""]), pa.array([None], pa.string()),
    ]  # fmt: skip
    assert len({digest(column) for column in columns}) == len(columns)
    two = pa.table({"a": [1], "b": [2]})
    assert (question_digests(two, ["a", "b"]) != question_digests(two, ["b", "a"])).any()
