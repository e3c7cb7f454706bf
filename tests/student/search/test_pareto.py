"""The plan of the sweep and its front."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilbeam.student.search.pareto import front, plan
from distilbeam.student.search.space import ParetoConfig


def test_the_front_by_hand():
    points = [
        {"bytes": 10, "accuracy": 0.7},
        {"bytes": 20, "accuracy": 0.6},  # larger and worse than the first
        {"bytes": 20, "accuracy": 0.8},
        {"bytes": 20, "accuracy": 0.8},  # its equal
        {"bytes": 30, "accuracy": 0.8},  # no better, and larger
        {"bytes": 5, "accuracy": 0.1},
    ]
    assert front(points, "bytes", "accuracy") == [True, False, True, True, False, True]
    assert front([], "bytes", "accuracy") == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1))
def test_every_other_point_is_dominated_by_one_on_the_front(pairs):
    points = [{"cost": cost, "quality": quality} for cost, quality in pairs]
    on = [pair for pair, chosen in zip(pairs, front(points, "cost", "quality"), strict=True) if chosen]
    for cost, quality in pairs:
        better = [(c, q) for c, q in on if c <= cost and q >= quality]
        assert better
        if (cost, quality) in on:
            assert set(better) == {(cost, quality)}


def test_the_plan_of_two_widths():
    stages = plan(ParetoConfig(widths=(0.5, 1), compressions=("int8",)))
    assert [stage.name for stage in stages] == [
        "shrunk-0.5",
        "improved-0.5",
        "improved-0.5-int8",
        "shrunk-1",
        "improved-1",
        "improved-1-int8",
        "pruned-0.5",
        "pruned-0.5-int8",
        "improved-2",
        "pruned-1",
        "pruned-1-int8",
    ]
    by_name = {stage.name: stage for stage in stages}
    assert by_name["pruned-0.5"].source == "improved-1"  # made once for both
    assert by_name["improved-1"].shown
    assert not by_name["improved-2"].shown
    assert not by_name["shrunk-1"].labels
    assert (by_name["pruned-1"].width, by_name["pruned-1"].built) == (1, 2)
    made = set()
    for stage in stages:
        assert stage.source is None or stage.source in made
        made.add(stage.name)


def test_one_strategy_alone():
    stages = plan(ParetoConfig(widths=(1,), strategies=("grow-improve-and-shrink",), compressions=(), grow=4))
    assert [(stage.name, stage.action, stage.built) for stage in stages] == [
        ("improved-4", "train", 4),
        ("pruned-1", "prune", 4),
    ]


def test_widths_are_checked():
    for widths in ((0.5, 0.5), (0.0, 1.0)):
        with pytest.raises(ValueError, match="widths must be different positive numbers"):
            ParetoConfig(widths=widths)
