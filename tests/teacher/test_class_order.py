"""Outputs are matched with classes by name, or refused."""

from __future__ import annotations

import logging

import pytest

from distilbeam.teacher.class_order import class_order

WHOSE = "id2label"


@pytest.mark.parametrize(
    ("own", "wanted", "order"),
    [
        (["a", "b", "c"], ["a", "b", "c"], None),
        (["positive", "neutral", "negative"], ["negative", "neutral", "positive"], [2, 1, 0]),
        (["POSITIVE", "NEGATIVE"], ["negative", "positive"], [1, 0]),
        (["New York", "los_angeles"], ["los angeles", "new-york"], [1, 0]),
        (["b", "a", "c"], ["0", "1", "2"], None),  # positions
        ([str(i) for i in range(12)], sorted(map(str, range(12))), [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]),
        (["LABEL_0", "LABEL_1"], ["no", "yes"], None),
        (["0", "1"], ["no", "yes"], None),
        (["LABEL_1", "LABEL_0"], ["LABEL_0", "LABEL_1"], [1, 0]),
        (["a", "A"], ["A", "a"], [1, 0]),
    ],
)
def test_the_order_is_found(own: list[str], wanted: list[str], order: list[int] | None) -> None:
    assert class_order(own, wanted, WHOSE) == order
    for place, name in enumerate(wanted):
        if order is not None and name in own:
            assert own[order[place]] == name


def test_positions_of_named_outputs_are_numbers_not_text() -> None:
    names = [chr(97 + i) for i in range(12)]
    wanted = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2: as sorted text stands
    assert class_order(names, wanted, WHOSE) == [int(name) for name in wanted]


@pytest.mark.parametrize(
    ("own", "wanted"), [(["a", "b"], ["a", "c"]), (["a", "A"], ["aa", "b"]), (["x", "y"], ["1", "2"])]
)
def test_other_names_are_refused(own: list[str], wanted: list[str]) -> None:
    with pytest.raises(ValueError, match=r"which is which cannot be known; use the teacher's names .*teacher.classes"):
        class_order(own, wanted, WHOSE)


def test_another_number_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"the teacher has 3 outputs \(a, b, c, from id2label\), the job 2 classes \(a, b\)"
    ):
        class_order(["a", "b", "c"], ["a", "b"], WHOSE)


def test_names_that_say_nothing_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        class_order(["LABEL_0", "LABEL_1"], ["no", "yes"], WHOSE)
    assert "they are taken in the order of data.classes" in caplog.text
