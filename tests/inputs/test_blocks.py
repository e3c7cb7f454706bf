"""Blocks of tokens: which positions have a label, and where a segment's tokens stand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilbeam.inputs.blocks import block_fields, block_length, has_label, position_ids


def test_a_position_has_a_label_when_the_next_token_is_of_its_segment_and_is_to_be_predicted() -> None:
    segments = np.array([[1, 1, 1, 2, 2, 0, 0]])
    assert has_label(segments, np.ones_like(segments)).tolist() == [[True, True, False, True, False, False, False]]
    prompt = np.array(
        [[0, 0, 1, 0, 1, 1, 1]]
    )  # the first two tokens of a segment, and the first of the other, are given
    assert has_label(segments, prompt).tolist() == [[False, True, False, True, False, False, False]]


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=8), st.integers(0, 3))
def test_labels_and_places_are_those_of_each_segment_alone(segments: list[tuple[int, bool]], padding: int) -> None:
    ids = np.array([[n + 1 for n, (size, _) in enumerate(segments) for _ in range(size)] + [0] * padding])
    mask = np.array([[int(kept) for size, kept in segments for _ in range(size)] + [1] * padding])
    expected, places = [], []
    for size, kept in segments:
        expected += [kept] * (size - 1) + [False]
        places += list(range(size))
    assert has_label(ids, mask).tolist() == [expected + [False] * padding]
    assert position_ids(ids).tolist() == [places + list(range(padding))]


def test_a_pool_says_how_long_its_blocks_are() -> None:
    fields = block_fields(8)
    assert block_length(pa.schema(fields), "data.pool") == 8
    with pytest.raises(
        ValueError, match=r"^data.pool must hold blocks of tokens: column segment_ids must be .*there is none"
    ):
        block_length(pa.schema([fields[0], fields[2]]), "data.pool")
    with pytest.raises(ValueError, match="got list<"):
        block_length(pa.schema([pa.field("input_ids", pa.list_(pa.int32())), *fields[1:]]), "data.pool")
    with pytest.raises(ValueError, match="blocks of one length, got input_ids 9, segment_ids 8, completion_mask 8"):
        block_length(pa.schema([block_fields(9)[0], *fields[1:]]), "data.pool")
