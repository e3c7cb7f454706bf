"""Labels by name and by index, and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from distilbeam.inputs.config import InputConfig
from distilbeam.student.data.labelled import class_indices, read_examples

CLASSES = ("red", "green", "blue")


@pytest.mark.parametrize(
    "labels", [["blue", "red"], np.array([2, 0], np.int8), pa.array(["blue", "red"]).dictionary_encode()]
)
def test_names_and_indices_are_the_same_labels(labels):
    assert class_indices(pa.table({"y": labels}), "y", CLASSES).tolist() == [2, 0]


def test_examples_keep_the_order_of_the_table_across_chunks():
    tables = [pa.table({"x": pa.array([[float(i)]], pa.list_(pa.float32(), 1)), "y": [i]}) for i in range(3)]
    examples = read_examples(pa.concat_tables(tables), "y", CLASSES, InputConfig(columns=("x",)))
    assert examples.inputs.tolist() == [[0.0], [1.0], [2.0]]
    assert examples.classes.tolist() == [0, 1, 2]
    assert len(examples) == 3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], "one of the 3 classes red, green, blue, got 3 in row 1"),
        ([0, -1], "got -1 in row 1"),
        (["red", None], "must have a value in every row, 1 are missing"),
        (["red", "pink"], "got 'pink' in row 1"),
    ],
)
def test_unknown_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        class_indices(pa.table({"y": labels}), "y", CLASSES)


def test_long_lists_of_classes_are_shortened():
    with pytest.raises(ValueError, match=r"one of the 100 classes 0, 1, .*, 9, ..., 99, got 'x' in row 0"):
        class_indices(pa.table({"y": ["x"]}), "y", [str(i) for i in range(100)])
