"""Rows, weights and estimates that no training can use are refused when they are read, with their file and number."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from problem import make_table
from small_trainings import NAMES, teacher_logits

from distilbeam.inputs.config import InputConfig, InputError
from distilbeam.student.data.loader import SoftLabelDataset
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.train import train
from distilbeam.teacher.softlabels import SoftLabelSpec, encode, write_shard

INPUT = InputConfig(columns=("x",))
STUDENT = StudentConfig(kind="linear", input=INPUT)
ROWS = 40


def with_number(table: pa.Table, row: int, value: float | None) -> pa.Table:
    """Put a value into the third feature of a row."""
    x = [list(features) for features in table["x"].to_pylist()]
    x[row][2] = value
    return table.set_column(table.column_names.index("x"), "x", pa.array(x, pa.list_(pa.float32(), 4)))


def write_labels(directory, table=None, **columns):
    """Write two shards of soft labels in two row groups each, with further columns."""
    table = make_table(ROWS, 1, labelled=False) if table is None else table
    spec = SoftLabelSpec(3, classes=NAMES, teacher="t", carried=("x",))
    labels = encode(teacher_logits(make_table(ROWS, 1, labelled=False)), spec)
    named = {"example_id": table["key"], "x": table["x"], **dict(zip(labels.schema.names, labels.columns, strict=True))}
    whole = pa.table({**named, **columns}).combine_chunks()
    for number in range(2):
        parts = [whole.slice(20 * number + 10 * part, 10).to_batches()[0] for part in range(2)]
        write_shard(directory, f"shard-{number}", parts, spec, f"s{number}")
    return directory


def fit(tmp_path, labels, student=STUDENT, labelled=None, validation=None, **training):
    return train(
        student,
        TrainConfig(**{"epochs": 2, "batch_size": 8, **training}),
        classes=NAMES,
        labelled=labelled,
        label_column="label",
        soft_labels=[] if labels is None else [labels],
        validation=validation,
        directory=tmp_path / "student",
        seed=0,
    )


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_number_that_is_none_is_found_in_the_soft_labels_with_its_file(tmp_path, value, shown):
    labels = write_labels(tmp_path / "labels", with_number(make_table(ROWS, 1, labelled=False), 33, value))
    with pytest.raises(
        ValueError,
        match=rf"shard-1.parquet: row 13 \(example_id '1-33'\) cannot be used: number 3 of its input is {shown}",
    ) as e:
        fit(tmp_path, labels)
    assert "training.lr" not in str(e.value)


def test_a_missing_number_is_found_in_the_soft_labels_with_its_file(tmp_path):
    labels = write_labels(tmp_path / "labels", with_number(make_table(ROWS, 1, labelled=False), 7, None))
    with pytest.raises(
        ValueError, match=r"shard-0.parquet: row 7 \(example_id '1-7'\) gives no input: .*missing values"
    ):
        fit(tmp_path, labels)


def test_a_huge_number_is_named_instead_of_the_learning_rate(tmp_path):
    labels = write_labels(tmp_path / "labels", with_number(make_table(ROWS, 1, labelled=False), 25, 3e38))
    with pytest.raises(
        ValueError,
        match=r"shard-1.parquet: row 5 \(example_id '1-25'\) cannot be used: .* is 3e\+38, which is too large",
    ) as e:
        fit(tmp_path, labels)
    assert "training.lr" not in str(e.value)


@pytest.mark.parametrize("name", ["labelled", "validation"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_labelled_example_without_a_number_is_refused_with_its_row(tmp_path, name, value):
    sets = {"labelled": make_table(30, 2, labelled=True), "validation": make_table(60, 3, labelled=True)}
    sets[name] = with_number(sets[name], 11, value)
    with pytest.raises(
        ValueError, match=rf"^row 11 of the {name} examples cannot be used: .*; correct it or leave it out"
    ):
        fit(tmp_path, None, **sets)


def test_a_large_number_is_named_where_it_is_seen_to_end_a_training(tmp_path):
    sets = {"labelled": make_table(30, 2, labelled=True), "validation": make_table(60, 3, labelled=True)}
    sets["validation"] = with_number(sets["validation"], 4, 9e17)
    student = StudentConfig(kind="small_trainings:Cubed", input=INPUT)
    with pytest.raises(
        ValueError, match=r"^row 4 of the validation examples cannot be answered: .* 9e\+17; correct"
    ) as e:
        fit(tmp_path, None, student, **sets)
    assert "training.lr" not in str(e.value)
    sets = {"labelled": with_number(make_table(30, 2, labelled=True), 4, 9e17)}
    with pytest.raises(
        ValueError, match=r"became (nan|inf) in step \d+ of \d+; a labelled example has 9e\+17 in its input"
    ) as e:
        fit(tmp_path, None, student, **sets)
    assert "training.lr" not in str(e.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0] * ROWS, "the soft labels' column weight must be above 0 in some row, it is 0 in all 40"),
        (
            [None] * ROWS,
            r"shard-0.parquet: row 0 \(example_id '1-0'\) has None in column weight, which must be finite and",
        ),
        ([1.0] * 25 + [None] * 15, r"shard-1.parquet: row 5 .* has None in column weight"),
        ([1.0, -1.0] * 20, r"row 1 .* has -1.0 in column weight, which must be finite and at least 0"),
        ([1.0] * 39 + [math.inf], r"shard-1.parquet: row 19 .* has inf in column weight"),
        ([math.nan] + [1.0] * 39, r"row 0 .* has nan in column weight"),
    ],
)
def test_weights_that_weigh_nothing_are_refused_when_they_are_read(tmp_path, values, message):
    labels = write_labels(tmp_path / "labels", weight=pa.array(values, pa.float64()))
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, labels, objective="weighted")
    assert not (tmp_path / "student.training").exists()
    fit(tmp_path, labels)  # nobody reads them


def test_whole_numbers_are_weights_and_only_their_ratios_matter(tmp_path):
    counts = [1 + i % 3 for i in range(ROWS)]
    metrics = []
    for name, values in (("whole", pa.array(counts)), ("eighth", pa.array(np.array(counts) / 8))):
        labels = write_labels(tmp_path / f"labels-{name}", weight=values)
        metrics.append(fit(tmp_path / name, labels, objective="weighted").metrics["train_loss"])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("alpha", 1.7, r"has 1.7\d* in column alpha, which must be from 0 to 1"),
        ("alpha", None, "has None in column alpha"),
        ("candidates", 0, "has 0 in column candidates, which must be from 1 to 3"),
        ("candidates", 4, "has 4 in column candidates"),
    ],
)
def test_estimates_out_of_range_are_refused_when_they_are_read(tmp_path, column, value, message):
    columns = {"alpha": [0.9] * ROWS, "candidates": [2] * ROWS}
    columns[column][21] = value
    types = {"alpha": pa.float32(), "candidates": pa.int16()}
    labels = write_labels(tmp_path / "labels", **{name: pa.array(v, types[name]) for name, v in columns.items()})
    with pytest.raises(ValueError, match=rf"shard-1.parquet: row 1 .* {message}"):
        fit(tmp_path, labels, objective="slam")


def test_settings_of_a_training_are_finite():
    for name in ("lr", "temperature", "hard_weight", "weight_decay", "clip"):
        for value in (math.inf, math.nan):
            with pytest.raises(ValueError, match=name):
                TrainConfig(**{name: value})


def test_what_is_read_again_is_not_checked_again(tmp_path, monkeypatch):
    labels = write_labels(tmp_path / "labels")
    calls = []
    monkeypatch.setattr("distilbeam.student.data.loader.require_finite", lambda inputs: calls.append(len(inputs)))
    dataset = SoftLabelDataset(labels, 8, 0, input=INPUT, cache_bytes=0)
    for _ in range(3):
        list(dataset)
    assert calls == [10] * 4


def test_the_row_is_named_whichever_rank_reads_it(tmp_path):
    labels = write_labels(tmp_path / "labels", with_number(make_table(ROWS, 1, labelled=False), 33, math.nan))
    for rank in range(2):
        with pytest.raises(InputError, match="row 13"):
            list(SoftLabelDataset(labels, 4, 0, rank, 2, input=INPUT))


def test_places_are_those_of_the_file_that_is_read(tmp_path):
    labels = write_labels(tmp_path / "labels")
    dataset = SoftLabelDataset(labels, 8, 0, input=INPUT)
    for row in (0, 9, 10, 19, 20, 39):
        place = dataset.place_of(row)
        file, number = place.split(": row ")[0], int(place.split(": row ")[1].split(" ")[0])
        assert pq.read_table(file)["example_id"][number].as_py() == f"1-{row}"
