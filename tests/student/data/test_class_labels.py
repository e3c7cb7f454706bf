"""What label columns of every type mean, and what whole numbers mean among classes whose names are numbers."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilbeam.student.checkpoint import load_student
from distilbeam.student.data.class_labels import find_classes, natural_order, parse_labels
from distilbeam.student.data.labelled import class_indices, integers_meant
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.launch import LaunchConfig, launch
from distilbeam.student.training.train import train


@pytest.mark.parametrize(
    ("column", "classes"),
    [
        (pa.array([2.0, 0.0, 2.0], pa.float64()), ("0", "1", "2")),
        (pa.array([2, 0, 2], pa.uint8()), ("0", "1", "2")),
        (pa.array([2, 0, 2], pa.int8()).dictionary_encode(), ("0", "1", "2")),
        (pa.array([Decimal("2.00"), Decimal("0.00"), Decimal("2.00")], pa.decimal128(5, 2)), ("0", "1", "2")),
        (pa.array([2, 0, 2], pa.float16()), ("0", "1", "2")),
        (pa.array(["c", "a", "c"], pa.large_string()), ("a", "b", "c")),
        (pa.array(["c", "a", "c"], pa.string_view()), ("a", "b", "c")),
        (pa.array(["c", "a", "c"]).dictionary_encode(), ("a", "b", "c")),
        (pa.array([b"c", b"a", b"c"], pa.binary()), ("a", "b", "c")),
        (pa.array([b"c", b"a", b"c"], pa.large_binary()), ("a", "b", "c")),
        (pa.array([b"c", b"a", b"c"], pa.binary_view()), ("a", "b", "c")),
        (pa.array([b"c", b"a", b"c"], pa.binary(1)), ("a", "b", "c")),
        (pa.array([2, 0, 2]), ("cat", "dog", "owl")),  # indices, since no name is a number
        (pa.array([3, 1, 3]), ("1", "2", "3")),  # names, since 3 is no index
        (pa.array([3.0, 1.0, 3.0]), ("1.0", "2.0", "3.0")),  # a number is the class of that number
        (pa.chunked_array([["c"], ["a", "c"]]), ("a", "b", "c")),
    ],
)
def test_every_type_names_classes(column, classes):
    assert class_indices(pa.table({"y": column}), "y", classes).tolist() == [2, 0, 2]


@pytest.mark.parametrize("classes", [("false", "true"), ("False", "True"), ("0", "1")])
def test_booleans(classes):
    assert class_indices(pa.table({"y": [True, False]}), "y", classes).tolist() == [1, 0]
    assert class_indices(pa.table({"y": [True, False]}), "y", classes[::-1]).tolist() == [0, 1]


def test_booleans_are_no_class_of_another_name():
    with pytest.raises(ValueError, match="must hold one of the 2 classes yes, no, got 'true' in row 0"):
        class_indices(pa.table({"y": [True, False]}), "y", ("yes", "no"))


def test_whole_numbers_of_two_meanings_are_refused_unless_the_meaning_is_known():
    table, classes = pa.table({"y": [1, 2]}), ("1", "2", "3")
    with pytest.raises(
        ValueError, match=r"1 is the name of a class and also the index of class '2'; write the labels as text"
    ):
        class_indices(table, "y", classes)
    assert class_indices(table, "y", classes, "names").tolist() == [0, 1]
    assert class_indices(table, "y", classes, "indices").tolist() == [1, 2]
    # a column that belongs to it and has another value tells
    assert integers_meant([table, pa.table({"y": [3]})], "y", classes) == "names"
    assert integers_meant([table, None, pa.table({"y": [0]})], "y", classes) == "indices"
    # names that are the indices have one meaning
    assert class_indices(table, "y", ("0", "1", "2")).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([0.0, float("nan")]), "must have a value in every row, 1 are missing, the first in row 1"),
        (pa.array([0, None]).dictionary_encode(), "1 are missing, the first in row 1"),
        (pa.nulls(2), "2 are missing, the first in row 0"),
        (pa.array([0.0, 0.5]), "must name classes, 0.5 in row 1 is no whole number"),
        (pa.array([0.0, float("inf")]), "inf in row 1 is no whole number"),
        (pa.array([0, 2**60]), "1152921504606846976 in row 1 is no whole number below 2\\^53"),
        (pa.array([Decimal("0.0"), Decimal("1.5")]), r"Decimal\('1.5'\) in row 1 is no whole number"),
        (pa.array([b"a", b"\xff"]), r"b'\\xff' in row 1 is not UTF-8; classes of other names are text"),
        (pa.array([[0], [1]]), "must hold text, whole numbers or booleans, which name classes, got list<"),
        (pa.array([7, 0]), "must hold one of the 2 classes a, b, got 7 in row 0"),
    ],
)
def test_what_names_no_class_is_named(column, message):
    with pytest.raises(ValueError, match=message):
        class_indices(pa.table({"y": column}), "y", ("a", "b"))


def test_numerals_are_in_the_order_of_their_numbers():
    assert natural_order(map(str, reversed(range(12)))) == tuple(map(str, range(12)))
    assert natural_order(["b", "1.5", "-2", "10", "a", "9", "-10"]) == ("-10", "-2", "1.5", "9", "10", "a", "b")
    assert natural_order(["class10", "class9"]) == ("class10", "class9")


def test_found_classes():
    labels = [parse_labels(pa.array(column), "y") for column in ([10, 9], ["9", "2"], [2.0])]
    assert find_classes(labels, "y") == ("2", "9", "10")
    for columns, message in (
        (([1, 1],), "at least two classes in the labelled sets, found 1"),
        (([True, False], [0, 1]), "booleans in all labelled sets or in none, found 0, 1, false, true"),
        (([1, 2], ["1.0", "2"]), "'1' and '1.0' are one number"),
    ):
        with pytest.raises(ValueError, match=message):
            find_classes([parse_labels(pa.array(column), "y") for column in columns], "y")


def test_a_student_remembers_what_whole_numbers_meant(tmp_path):
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    features = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 2)
    student = StudentConfig.model_validate({"kind": "linear", "input": {"columns": ["x"]}})
    for labels, classes, meant in (
        ([1, 2, 3, 1, 2, 3], ("1", "2", "3"), "names"),
        ([0, 1, 2, 0, 1, 2], ("1", "2", "3"), "indices"),
        (list("abcabc"), ("a", "b", "c"), None),
    ):
        result = train(
            student,
            TrainConfig(epochs=1),
            classes=classes,
            labelled=pa.table({"x": features, "y": labels}),
            label_column="y",
            soft_labels=[],
            validation=None,
            directory=tmp_path / f"{meant}",
            seed=0,
        )
        assert load_student(result.directory).extra["integer_labels"] == meant


def test_a_launched_training_takes_a_word_for_whole_numbers_of_two_meanings(tmp_path):
    x = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(8, dtype=np.float32)), 2)
    pq.write_table(pa.table({"x": x, "label": [1, 2, 1, 2]}), tmp_path / "labelled.parquet")
    settings = {
        "data": {"labelled": "labelled.parquet", "classes": ["1", "2", "3"]},
        "student": {"kind": "linear", "input": {"columns": ["x"]}},
        "training": {"epochs": 1},
    }
    with pytest.raises(ValueError, match="1 is the name of a class and also the index of class '2'"):
        launch(LaunchConfig.model_validate(settings), tmp_path)
    settings["data"]["integers"] = "indices"
    result = launch(LaunchConfig.model_validate(settings), tmp_path)
    assert load_student(result.directory).extra["integer_labels"] == "indices"
