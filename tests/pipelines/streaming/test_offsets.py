"""Sets of offsets, against Python's own sets."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from distilbeam.pipelines.streaming.offsets import Offsets

intervals = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30), st.integers(-2, 8)), max_size=12)


def filled(items: list[tuple[int, int, int]]) -> tuple[Offsets, set[tuple[int, int]]]:
    offsets, truth = Offsets(), set()
    for partition, first, size in items:
        offsets.add(partition, first, first + size - 1)
        truth |= {(partition, offset) for offset in range(first, first + size)}
    return offsets, truth


@given(intervals, intervals)
def test_they_are_sets(one: list[tuple[int, int, int]], two: list[tuple[int, int, int]]) -> None:
    offsets, truth = filled(one)
    other, more = filled(two)
    offsets.update(other)
    truth |= more
    everything = [(partition, offset) for partition in (0, 1) for offset in range(45)]
    assert [place in offsets for place in everything] == [place in truth for place in everything]
    assert offsets.count == len(truth)
    pairs = list(offsets)
    assert all(first <= last for _, first, last in pairs)
    assert all(a[0] < b[0] or a[2] + 1 < b[1] for a, b in pairwise(pairs)), "neighbours are joined"
    assert Offsets.from_json(json.loads(json.dumps(offsets.to_json()))) == offsets


@given(intervals, st.integers(0, 40), st.integers(0, 40))
def test_what_is_missing(items: list[tuple[int, int, int]], start: int, stop: int) -> None:
    offsets, truth = filled(items)
    missing = [offset for a, b in offsets.missing(0, start, stop) for offset in range(a, b + 1)]
    assert missing == [offset for offset in range(start, stop) if (0, offset) not in truth]
    assert offsets.first_missing(0, start) == next(o for o in range(start, 100) if (0, o) not in truth)
