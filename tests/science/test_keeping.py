"""Rows of a former report beside new ones: none lost, none twice, none instead of a new one, none made otherwise."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pyarrow.parquet as pq
import pytest

from benchmarks.science import command, digits, keeping, problems, study1, study2, study5
from benchmarks.science.cells import Store
from benchmarks.science.command import Arguments, collect
from benchmarks.science.keeping import basis, beside_former
from benchmarks.science.report import write_parquet
from benchmarks.science.report1 import write_report as report1
from distilbeam.student.networks.config import StudentConfig

NAMES = ("dataset", "teacher", "method")
KEY = {"recipe": 1, "dataset_recipe": 1, "about": {"steps": 9}, "settings": {"labels": 5}}


def row(dataset, method, number, figure, **more):
    return {"dataset": dataset, "teacher": "t", "method": method, "round": number, "accuracy": figure, **more}


@pytest.fixture
def former(tmp_path):
    def write(rows, name="former.parquet"):
        write_parquet(tmp_path / name, pd.DataFrame(rows))
        return tmp_path / name

    return write


def figures(rows):
    return [(one["dataset"], one["method"], one["round"], one["accuracy"]) for one in rows]


def test_new_cells_take_the_place_of_former_ones_and_the_others_stay(former):
    path = former(
        [
            row("a", "x", 0, 0.1),
            row("a", "x", 1, 0.2),
            row("a", "y", 0, 0.3),
            row("b", "x", 0, 0.4),
            row("b", "x", 1, 0.5),
        ]
    )
    new = [row("c", "x", 0, 0.6), row("a", "z", 0, 0.7), row("a", "x", 0, 0.8)]
    found = beside_former(path, new, NAMES, lambda _: KEY)
    # the cell a, x has one round now; nothing of its former rows is left, and it stands where it stood
    assert figures(found) == [
        ("a", "x", 0, 0.8),
        ("a", "y", 0, 0.3),
        ("b", "x", 0, 0.4),
        ("b", "x", 1, 0.5),
        ("c", "x", 0, 0.6),
        ("a", "z", 0, 0.7),
    ]


def test_other_versions_recipes_and_settings_are_refused(former, monkeypatch):
    told, untold = former([row("a", "x", 0, 0.1, basis=basis(KEY))]), former([row("a", "x", 0, 0.1)], "untold.parquet")
    for path in (told, untold):
        assert beside_former(path, [], NAMES, lambda _: KEY) == [row("a", "x", 0, 0.1, basis=basis(KEY))]
        for other in ({"recipe": 2}, {"dataset_recipe": 2}, {"bought_by_recipe": 2}, {"settings": None}):
            with pytest.raises(SystemExit, match="rows of a, t, that were made with other settings or recipes"):
                beside_former(path, [], NAMES, lambda _, other=other: KEY | other)
            new = [row("a", "x", 0, 0.2)]
            assert beside_former(path, new, NAMES, lambda _, other=other: KEY | other) == new  # nothing old is kept
    for other in ({"settings": {"labels": 6}}, {"about": {"steps": 10}}):
        with pytest.raises(SystemExit, match="other settings or recipes"):
            beside_former(told, [], NAMES, lambda _, other=other: KEY | other)
    with pytest.raises(SystemExit, match="has no column buyer"):
        beside_former(told, [], (*NAMES, "buyer"), lambda _: KEY)
    with pytest.raises(SystemExit, match="there is no"):
        beside_former(told.with_name("absent.parquet"), [], NAMES, lambda _: KEY)
    monkeypatch.setattr(keeping, "about_machine", lambda: {"packages": {"torch": "1.0", "numpy": "1.0"}})
    with pytest.raises(SystemExit, match=r"was made with torch .*, this is 1\.0"):
        beside_former(told, [], NAMES, lambda _: KEY)


@pytest.fixture
def given(monkeypatch, tmp_path):
    monkeypatch.setattr(digits, "STEPS", 12)
    monkeypatch.setattr(digits, "SIZES", {"lesson": 150, "labelled": 20, "validation": 60, "pool": 300, "test": 200})
    dataset = replace(digits.digits(), teachers={"50 labels": {"labels": 50}})
    store = Store(tmp_path / "cells")
    return Arguments((dataset,), range(2), store, None, tmp_path / "out", True, ("uniform",), ("hard", "calibrated"))


def test_a_study_in_two_calls_is_the_study_in_one(given, monkeypatch):
    whole = collect(given, study2.study_cells(given))
    first = replace(given, methods=("hard",), seeds=range(1))
    write_parquet(given.out / "study2.parquet", pd.DataFrame(collect(first, study2.study_cells(first))))
    second = replace(given, methods=("calibrated",), keep=True)
    rows = collect(second, study2.study_cells(second))
    assert len(rows) == 3
    write_parquet(given.out / "study2.parquet", pd.DataFrame(rows))
    third = replace(given, methods=("hard",), keep=True)
    rows = collect(third, study2.study_cells(third))
    order = lambda one: (one["seed"], one["method"])  # noqa: E731
    assert sorted(rows, key=order) == sorted(whole, key=order)
    monkeypatch.setattr(study2, "RECIPE", 2)
    none = replace(second, minutes=0)  # the cells of the new recipe are not there
    with pytest.raises(SystemExit, match="other settings or recipes"):
        collect(none, study2.study_cells(none))
    monkeypatch.setattr(study1, "RECIPE", 2)
    everything = replace(given, keep=True)
    rows = collect(everything, study2.study_cells(everything))
    assert [one["bought_by_recipe"] for one in rows] == [2] * 4


def test_study_1_reports_kept_rows_alone(given):
    about = {
        "study": "study1",
        "dataset": "digits",
        "teacher": "50 labels",
        "schedule": "small",
        "labels": "calibrated",
    }
    names = ("teacher_accuracy", "teacher_error", "gain_expected", "gain_correct", "select_s", "accuracy")
    rows = [about | {"method": "margin", "seed": s, "budget": 0.1} | dict.fromkeys(names, 0.5) for s in range(3)]
    report1(given, rows)
    assert len(pq.read_table(given.out / "study1.parquet")) == 3
    report1(given, [*rows, rows[0] | {"seed": 3, "rows": [1, 2]}])
    assert "rows" not in pq.read_schema(given.out / "study1.parquet").names


def test_methods_that_a_report_renames_are_kept_once(given, monkeypatch):
    asked = replace(given, methods=None, seeds=range(1), keep=True)
    monkeypatch.setattr(study5, "WIDTHS", (1.0,))
    monkeypatch.setattr(study5, "arguments", lambda *_: asked)
    monkeypatch.setattr(command, "beside_former", lambda _, rows, *__: rows)
    monkeypatch.setattr(study5, "_int8", lambda *_: {"accuracy": 0.5, "bytes": 1})
    study5.main()
    once = pq.read_table(given.out / "study5.parquet").to_pylist()
    monkeypatch.setattr(command, "beside_former", beside_former)
    study5.main()
    assert pq.read_table(given.out / "study5.parquet").to_pylist() == once
    assert {one["method"] for one in once} >= {"human, float32", "human, int8"}


def test_settings_that_are_off_leave_cells_of_before_them_as_they_are():
    plain = problems.about({}, 1, student=StudentConfig(input={"columns": ["x"]}))["student"]
    assert not {"init", "encoder"} & plain.keys()
    reads = {"kind": "text", "columns": ["t"]}
    started = StudentConfig(kind="text", input=reads, init="encoder", encoder={"column": "v"})
    assert problems.about({}, 1, student=started)["student"]["encoder"]["column"] == "v"
