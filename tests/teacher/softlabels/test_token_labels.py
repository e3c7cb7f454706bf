"""Labels of tokens: their specification, and the way from arrays to a shard and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from language_models import blocks_of, labelled, random_labels

from distilbeam.inputs.blocks import BLOCK_COLUMNS, has_label
from distilbeam.teacher.softlabels import (
    SoftLabelSpec,
    TokenLabels,
    decode,
    decode_tokens,
    encode,
    label_schema,
    read_manifest,
    write_shard,
)
from distilbeam.teacher.softlabels.codec import round_to_half
from distilbeam.teacher.softlabels.token_labels import encode_tokens
from distilbeam.teacher.softlabels.verify_tokens import wanted_form

LENGTH, K = 12, 4
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [3] + [0] * 2, [1] * 12, [0] * 12])


def spec_of(kind: Any = "top_k", **fields: Any) -> SoftLabelSpec:
    given = {"k": K, "unit": "token", "sequence_length": LENGTH, "tokenizer": "ab", "teacher": "t", **fields}
    return SoftLabelSpec(300, kind, carried=BLOCK_COLUMNS, **given)


def test_the_text_of_a_specification_of_examples_is_that_of_format_1() -> None:
    assert SoftLabelSpec(3, "top_k", 2, teacher="t").to_json() == (
        '{"carried": [], "classes": null, "format": "distilbeam.softlabels", "k": 2, "kind": "top_k", "num_classes": 3, '
        '"storage": "float32", "teacher": "t", "temperature": 1.0, "version": "1.1"}'
    )
    assert SoftLabelSpec(3, "top_k", 2, teacher="t").meaning() == "2d879e4e9e0246ae66747df24ac51e08"


def test_a_specification_of_tokens_is_of_format_2_and_comes_back() -> None:
    spec = spec_of(source="server:vllm:cap=20")
    data = json.loads(spec.to_json())
    assert data["version"] == "2.0"
    assert (data["unit"], data["sequence_length"], data["positions"]) == ("token", LENGTH, "all")
    assert (data["tokenizer"], data["source"]) == ("ab", "server:vllm:cap=20")
    assert SoftLabelSpec.from_json(spec.to_json()) == spec
    assert (spec.width, spec.labels_per_row, spec.answer_width) == (LENGTH * K, LENGTH, 2 * LENGTH * (K + 1))


@pytest.mark.parametrize(
    "change",
    [{"sequence_length": 13}, {"positions": 5}, {"tokenizer": "cd"}, {"source": "server:vllm:cap=20"}, {"k": 5}],
)
def test_everything_that_tokens_add_is_meaning(change: dict[str, Any]) -> None:
    one, two = spec_of(), spec_of(**change)
    (name,) = change
    assert one.meaning() != two.meaning()
    assert [text.split(" ")[0] for text in one.differences(two)] == [name]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"unit": "word"}, "unit must be one of example, token, got 'word'"),
        ({"sequence_length": None}, "sequence_length must be a whole number from 2 to 1,048,576, got None"),
        ({"positions": 13}, "positions must be a whole number from 1 to 12, got 13"),
        ({"tokenizer": ""}, "tokenizer must be given for token labels, got ''"),
        ({"kind": "dense", "k": None}, "kind must be top_k or sampled for token labels"),
        ({"version": "1.1"}, "version must be 2.x for labels of unit 'token', got 1.1"),
    ],
)
def test_a_specification_of_tokens_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        spec_of(**fields)


def test_what_belongs_to_tokens_is_refused_for_examples() -> None:
    with pytest.raises(ValueError, match="must be left out unless unit is 'token'"):
        SoftLabelSpec(3, sequence_length=8)
    with pytest.raises(ValueError, match=r"version must be 1.x for labels of unit 'example', got 2.0"):
        SoftLabelSpec.from_json({**json.loads(SoftLabelSpec(3).to_json()), "version": "2.0"})


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_a_shard_gives_back_what_was_written(tmp_path: Path, kind: str, storage: str) -> None:
    spec = spec_of(kind, storage=storage)
    blocks = blocks_of(SEGMENTS)
    labels = random_labels(blocks, spec)
    write_shard(tmp_path, "one", labelled(blocks, labels, spec), spec, "k1")
    (file,) = read_manifest(tmp_path).paths()
    table = pq.read_table(file)
    assert table.schema.field("input_ids").type == pa.list_(pa.field("element", pa.int32(), nullable=False), LENGTH)
    found = decode_tokens(table, read_manifest(tmp_path).spec)
    np.testing.assert_array_equal(found.classes, labels.classes)
    expected = labels.logprobs if kind == "sampled" else round_to_half(labels.logprobs).astype(np.float32)
    np.testing.assert_array_equal(found.logprobs, expected)
    np.testing.assert_array_equal(found.token_logprob, labels.token_logprob)
    np.testing.assert_array_equal(found.labelled, has_label(SEGMENTS, (SEGMENTS > 0).astype(int)))
    assert (found.tail_logmass is None) == (kind == "sampled")
    if found.tail_logmass is not None:
        np.testing.assert_array_equal(found.tail_logmass, labels.tail_logmass)


def test_what_has_no_label_is_minus_one_and_zero(tmp_path: Path) -> None:
    spec = spec_of()
    write_shard(
        tmp_path, "one", labelled(blocks_of(SEGMENTS), random_labels(blocks_of(SEGMENTS), spec), spec), spec, "k1"
    )
    row = pq.read_table(tmp_path / "one.parquet").to_pylist()[2]  # all padding
    assert set(row["teacher_classes"]) == {-1}
    assert (
        set(row["teacher_logprobs"]) == set(row["teacher_tail_logmass"]) == set(row["teacher_token_logprob"]) == {0.0}
    )


def test_chosen_positions_name_themselves(tmp_path: Path) -> None:
    spec = spec_of(positions=3)
    blocks = blocks_of(SEGMENTS[:2])
    rng = np.random.default_rng(0)
    shape = (2, 3)
    labels = TokenLabels(
        rng.integers(300, size=(*shape, K)).astype(np.int32),
        -rng.random((*shape, K), np.float32),
        -rng.random(shape, np.float32),
        -rng.random(shape, np.float32),
        np.array([[0, 2, 6], [1, 5, 9]], np.int32),
    )
    write_shard(tmp_path, "one", labelled(blocks, labels, spec), spec, "k1")
    found = decode_tokens(pq.read_table(tmp_path / "one.parquet"), spec)
    assert found.positions is not None
    assert found.positions.tolist() == [[0, 2, 6], [1, 5, 9]]
    assert found.classes.shape == (2, 3, K)
    with pytest.raises(ValueError, match="label_positions must be given for top_k labels of positions '3'"):
        encode_tokens(TokenLabels(labels.classes, labels.logprobs, labels.tail_logmass, labels.token_logprob), spec)


@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_an_answer_is_one_row_of_numbers_and_back(kind: str) -> None:
    spec = spec_of(kind)
    labels = random_labels(blocks_of(SEGMENTS), spec)
    rows = labels.pack()
    assert rows.shape == (3, spec.answer_width)
    assert rows.dtype == np.float32
    found = TokenLabels.unpack(rows, spec)
    np.testing.assert_array_equal(found.classes, labels.classes)
    np.testing.assert_array_equal(found.logprobs, labels.logprobs)
    np.testing.assert_array_equal(found.token_logprob, labels.token_logprob)
    assert (found.tail_logmass is None) == (labels.tail_logmass is None)


def test_labels_of_the_other_unit_are_refused() -> None:
    tokens, examples = spec_of(), SoftLabelSpec(300, "top_k", K)
    batch = encode(np.zeros((1, 300)), examples)
    with pytest.raises(ValueError, match=r"^the dataset holds labels of tokens \(unit 'token', 12 labels in a row\)"):
        decode(batch, tokens)
    with pytest.raises(
        ValueError, match=r"^the dataset holds labels of examples \(unit 'example', one label in a row\)"
    ):
        decode_tokens(batch, examples)
    with pytest.raises(ValueError, match="the specification holds labels of tokens"):
        encode(np.zeros((1, 300)), tokens)
    with pytest.raises(ValueError, match="labels of tokens must have the shape"):
        encode_tokens(TokenLabels.empty(2, spec_of(sequence_length=8)), tokens)


def test_columns_are_checked() -> None:
    spec = spec_of()
    table = labelled(blocks_of(SEGMENTS), random_labels(blocks_of(SEGMENTS), spec), spec)
    with pytest.raises(ValueError, match="soft labels must have a column teacher_token_logprob"):
        decode_tokens(table.drop_columns(["teacher_token_logprob"]), spec)
    assert label_schema(spec).names == [
        "teacher_logprobs",
        "teacher_classes",
        "teacher_tail_logmass",
        "teacher_token_logprob",
    ]


def test_a_server_is_asked_again_for_no_more_classes_than_it_may_allow() -> None:
    """A model here is asked for more than were stored, to know classes that have come down; vLLM allows 20 as it is started."""
    assert wanted_form(spec_of())["k"] == 64
    assert wanted_form(spec_of(), served=True)["k"] == K
    assert wanted_form(spec_of("sampled", k=32))["k"] == 64
    assert wanted_form(spec_of("sampled", k=32), served=True)["k"] == 20
    assert wanted_form(spec_of(source="server:vllm"))["k"] == K
