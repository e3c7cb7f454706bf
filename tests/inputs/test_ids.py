"""Inputs that are ids for an embedding: lists of token ids, hashed n-grams, and how many ids there are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import HashingVectorizer

from distilbeam.inputs.config import InputConfig, InputError, make_input, vocabulary_size


def tokens(column: pa.Array, **options: Any) -> np.ndarray:
    config = InputConfig(**{"kind": "tokens", "columns": ("t",), "vocabulary": 50, "max_length": 3, **options})
    made: np.ndarray = make_input(config)(pa.record_batch({"t": column}))
    return made


@given(
    rows=st.lists(st.lists(st.integers(0, 49), max_size=6), max_size=8),
    start=st.integers(0, 4),
    length=st.integers(1, 5),
    type_=st.sampled_from([pa.int32(), pa.int64(), pa.uint16()]),
)
def test_lists_are_cut_and_padded_whatever_their_lengths(
    rows: list[list[int]], start: int, length: int, type_: pa.DataType
) -> None:
    column = pa.array(rows, pa.list_(type_)).slice(start)
    found = tokens(column, max_length=length, pad_id=7)
    expected = [(row + [7] * length)[:length] for row in rows[start:]]
    assert found.dtype == np.int64
    assert found.shape == (len(expected), length)
    assert found.tolist() == expected


def test_lists_of_every_kind_are_read() -> None:
    for column in (
        pa.array([[1, 2], [3, 4]], pa.large_list(pa.int16())),
        pa.array([[0, 0], [1, 2], [3, 4]], pa.list_(pa.int32(), 2)).slice(1),
    ):
        assert tokens(column).tolist() == [[1, 2, 0], [3, 4, 0]]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1, 50]]), "column t must hold ids from 0 to 49, got 50"),
        (pa.array([[1, -3], [60]]), "column t must hold ids from 0 to 49, got -3"),
        (pa.array([[1], None]), "column t must not have missing values, got 1"),
        (pa.array([[1, None]]), "column t must not have missing values, got 1"),
        (pa.array([[1.0]]), "column t must hold lists of token ids, got list<"),
        (pa.array(["a"]), "column t must hold lists of token ids, got string"),
    ],
)
def test_columns_that_hold_no_ids_are_sentences(column: pa.Array, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tokens(column)


@pytest.mark.parametrize("pad_id", [0, 5, 39])
def test_hashed_ngrams_are_their_buckets_as_often_as_they_occur(pad_id: int) -> None:
    texts = ["the cat the dog the end", "", "a", "cat"]
    config = InputConfig(
        kind="text", columns=("t",), buckets=40, ngrams=(1, 2), ngram_form="ids", max_length=16, pad_id=pad_id
    )
    found = make_input(config)(pa.record_batch({"t": texts}))
    counts = (
        HashingVectorizer(n_features=39, ngram_range=(1, 2), norm=None, alternate_sign=False).transform(texts).toarray()
    )
    assert found.shape == (4, 16)
    assert (found[1:3] == pad_id).all()  # "a" is too short for a word
    for row, of_buckets in zip(found, counts, strict=True):
        without_padding = np.insert(of_buckets, pad_id, 0)
        assert np.array_equal(np.bincount(row[row != pad_id], minlength=40), without_padding)
    cut = make_input(config.model_copy(update={"max_length": 4}))(pa.record_batch({"t": texts}))
    assert np.array_equal(cut, found[:, :4])
    assert make_input(config)(pa.record_batch({"t": pa.array([], pa.string())})).shape == (0, 16)


def test_the_number_of_ids_is_known(tmp_path: Any) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"[PAD]": 0, "good": 1, "film": 2}, unk_token="[PAD]")
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(model).save(str(path))
    text = {"kind": "text", "columns": ("t",)}
    for options, expected in (
        ({"kind": "tokens", "columns": ("t",), "vocabulary": 77}, 77),
        ({**text, "ngram_form": "ids", "buckets": 512}, 512),
        ({**text, "tokenizer": str(path)}, 3),
        ({**text, "tokenizer": str(path), "pad_id": 9}, 10),
        ({**text, "tokenizer": str(path), "vocabulary": 8}, 8),
    ):
        assert vocabulary_size(InputConfig(**options)) == expected
    with pytest.raises(ValueError, match="input of kind 'text' must give ids to have a vocabulary; it gives numbers"):
        vocabulary_size(InputConfig(**text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "tokens"}, "vocabulary must be given for input of kind 'tokens'"),
        ({"kind": "tokens", "vocabulary": 9, "pad_id": 9}, "pad_id must be below the vocabulary of 9, got 9"),
        ({"kind": "text", "tokenizer": "x", "ngram_form": "ids"}, "tokenizer and ngram_form 'ids' must not both be"),
        (
            {"kind": "tokens", "vocabulary": 9, "columns": ("a", "b")},
            "columns must be one column for tokens input, got 2",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_sentences(options: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        InputConfig(**{"columns": ("t",), **options})
