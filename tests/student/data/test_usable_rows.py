"""Rows without an input are found one by one, at few attempts."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.student.data.labelled import read_examples
from distilbeam.student.data.usable_rows import find_usable

VECTOR = InputConfig(columns=("x",))


def batch(rows):
    return pa.RecordBatch.from_pydict({"x": pa.array(rows, pa.list_(pa.float32()))})


def test_each_kind_of_row_has_its_reason():
    rows = [[1.0, 2.0], [math.nan, 0.0], None, [3.0, 4.0], [0.0, math.inf], [1.0, None], [1.0], [2.0, 1e38], [5.0, 6.0]]
    found = find_usable(make_input(VECTOR), batch(rows))
    assert found.rows.tolist() == [0, 3, 8]
    np.testing.assert_array_equal(found.inputs, np.array([[1, 2], [3, 4], [5, 6]], np.float32))
    expected = {
        1: "number 1 of its input is nan, which is not a finite number",
        2: "must not have missing values",
        4: "number 2 of its input is inf, which is not a finite number",
        5: "must not have missing values",
        6: r"its input has the shape \[1\], that of the others is \[2\]",
        7: r"number 2 of its input is 1e\+38, which is too large for a network of float32",
    }
    assert sorted(found.reasons) == sorted(expected)
    for row, reason in expected.items():
        with pytest.raises(ValueError, match=reason):
            raise ValueError(found.reasons[row])


def test_a_batch_without_such_rows_is_made_once_and_one_bad_row_costs_few_attempts():
    calls = []

    def counted(rows):
        calls.append(rows.num_rows)
        return make_input(VECTOR)(rows)

    rows = [[float(i), 1.0] for i in range(1024)]
    assert find_usable(counted, batch(rows)).rows.tolist() == list(range(1024))
    assert calls == [1024]
    calls.clear()
    rows[700] = None
    assert sorted(find_usable(counted, batch(rows)).reasons) == [700]
    assert len(calls) == 1 + 2 * 10


def test_the_shape_may_be_known_and_nothing_may_be_left():
    found = find_usable(make_input(VECTOR), batch([[1.0], [2.0]]), (2,))
    assert not len(found.rows)
    assert found.inputs is None
    assert sorted(found.reasons) == [0, 1]
    assert find_usable(make_input(VECTOR), batch([None])).inputs is None


def test_undecodable_images_are_found():
    pytest.importorskip("PIL")
    config = InputConfig(kind="image", columns=("x",), size=(2, 2))
    rows = pa.RecordBatch.from_pydict({"x": [b"no image", b"nor this"]})
    assert sorted(find_usable(make_input(config), rows).reasons) == [0, 1]


def test_labelled_examples_name_the_row():
    table = pa.table({"x": pa.array([[1.0], [2.0], [math.nan]], pa.list_(pa.float32())), "y": [0, 1, 1]})
    with pytest.raises(
        ValueError, match=r"row 2 of the labelled examples cannot be used: number 1 of its input is nan"
    ):
        read_examples(table, "y", ("a", "b"), VECTOR)
