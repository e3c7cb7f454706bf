"""Labelled sets of a run: every type of label, bad rows, names of ours, changed rows, what is said of them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from problem import asked, make_table, write_problem
from rich.console import Console

from distilbeam.pipelines.config import parse_config, parse_label_config
from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.experiments.evaluate import evaluate_directory
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.labelling import LabellingJob
from distilbeam.pipelines.jobs.set_notes import notes_on, require_different_sets
from distilbeam.pipelines.pool.datasets import load_inputs
from distilbeam.pipelines.steps import run
from distilbeam.pipelines.transforms.label_examples import LabelExamples
from distilbeam.teacher.softlabels import SoftLabelSpec

SETS = {"labelled": (15, 2), "validation": (60, 3), "test": (80, 4)}


def relabel(directory: Path, change: Any, names: tuple[str, ...] = ("labelled", "validation", "test")) -> None:
    for name in names:
        table = make_table(*SETS[name], labelled=True)
        pq.write_table(table.set_column(2, "label", change(table["label"])), directory / f"{name}.parquet")


def truth() -> list[int]:
    return make_table(*SETS["validation"], labelled=True)["label"].to_pylist()


CHANGES = {
    "float": lambda y: y.cast(pa.float64()),
    "decimal": lambda y: y.cast(pa.decimal128(25, 2)),
    "text": lambda y: y.cast(pa.string()),
    "large text": lambda y: y.cast(pa.large_string()),
    "bytes": lambda y: y.cast(pa.string()).cast(pa.binary()),
    "dictionary": lambda y: y.cast(pa.string()).dictionary_encode(),
    "dictionary of numbers": lambda y: y.cast(pa.int8()).dictionary_encode(),
    "from one on": lambda y: pc.add(y, 1),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_run_and_an_evaluation_read_every_type_alike(problem: dict[str, Any], tmp_path: Path, kind: str) -> None:
    relabel(tmp_path, CHANGES[kind])
    inputs = load_inputs(parse_config(problem).relative_to(tmp_path))
    assert inputs.classes == (("1", "2", "3") if kind == "from one on" else ("0", "1", "2"))
    assert inputs.validation.truth.tolist() == truth()
    root = run(problem, base=tmp_path, until=("train", 0))
    whole = evaluate_directory(root / "students" / "round=000", tmp_path / "test.parquet", "label")
    numbers = make_table(*SETS["test"], labelled=True)["label"].to_numpy()
    assert [c["examples"] for c in whole["classes"]] == np.bincount(numbers).tolist()
    # the rows of two classes mean what they meant among all
    table = pq.read_table(tmp_path / "test.parquet")
    part = tmp_path / "part.parquet"
    pq.write_table(table.filter(pa.array(numbers < 2)), part)
    some = evaluate_directory(root / "students" / "round=000", part, "label")
    assert [c["examples"] for c in some["classes"]] == [*np.bincount(numbers)[:2].tolist(), 0]
    assert [c["recall"] for c in some["classes"]][:2] == [c["recall"] for c in whole["classes"]][:2]


def test_sets_of_different_types(problem: dict[str, Any], tmp_path: Path) -> None:
    relabel(tmp_path, CHANGES["text"], ("labelled",))
    relabel(tmp_path, CHANGES["float"], ("test",))
    inputs = load_inputs(parse_config(problem).relative_to(tmp_path))
    assert inputs.classes == ("0", "1", "2")
    assert inputs.validation.truth.tolist() == truth()
    relabel(tmp_path, lambda y: pc.equal(y, 1), ("labelled",))
    with pytest.raises(
        ValueError, match=r"^data.label: column label must hold booleans in all labelled sets or in none"
    ):
        load_inputs(parse_config(problem).relative_to(tmp_path))


def test_numbers_are_indices_of_classes_with_other_names(problem: dict[str, Any], tmp_path: Path) -> None:
    problem["data"]["classes"] = ["cat", "dog", "owl"]
    inputs = load_inputs(parse_config(problem).relative_to(tmp_path))
    assert inputs.validation.truth.tolist() == truth()
    assert inputs.validation.table["label"].to_pylist() == [("cat", "dog", "owl")[y] for y in truth()]


def test_numerals_are_ordered_as_numbers_and_a_started_run_keeps_its_order(
    problem: dict[str, Any], tmp_path: Path
) -> None:
    relabel(tmp_path, lambda y: pc.multiply(y, 5).cast(pa.string()))  # "0", "5", "10"
    config = parse_config(problem)
    assert load_inputs(config.relative_to(tmp_path)).classes == ("0", "5", "10")
    former = load_inputs(config.relative_to(tmp_path), ("0", "10", "5"))
    assert former.classes == ("0", "10", "5")
    assert former.validation.truth.tolist() == [{0: 0, 1: 2, 2: 1}[y] for y in truth()]
    assert load_inputs(config.relative_to(tmp_path), ("0", "5", "11")).classes == ("0", "5", "10")


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("name", ["labelled", "validation", "test"])
def test_a_row_without_an_input_is_named_before_anything_is_done(
    problem: dict[str, Any], tmp_path: Path, name: str, value: float | None
) -> None:
    table = make_table(*SETS[name], labelled=True)
    x = [list(row) for row in table["x"].to_pylist()]
    x[7][2] = value
    rows = table.set_column(1, "x", pa.array(x, pa.list_(pa.float32(), 4)))
    (tmp_path / name).mkdir()
    for part, start, stop in (("a", 0, 5), ("b", 5, table.num_rows)):
        pq.write_table(rows.slice(start, stop - start), tmp_path / name / f"{part}.parquet")
    problem["data"][name] = name
    with pytest.raises(ValueError, match=rf"^data.{name}: row 2 of .*{name}/b.parquet cannot be used: .*; correct it"):
        run(problem, base=tmp_path)
    assert asked(tmp_path) == []
    assert not (tmp_path / "run" / "students").exists()


def test_an_evaluation_names_a_row_without_an_input(problem: dict[str, Any], tmp_path: Path) -> None:
    root = run(problem, base=tmp_path, until=("train", 0))
    table = make_table(*SETS["test"], labelled=True)
    x = [list(row) for row in table["x"].to_pylist()]
    x[3][0] = math.nan
    pq.write_table(table.set_column(1, "x", pa.array(x, pa.list_(pa.float32(), 4))), tmp_path / "test.parquet")
    with pytest.raises(
        ValueError, match=r"^--data: row 3 of .*test.parquet cannot be used: number 1 of its input is nan"
    ):
        evaluate_directory(root / "students" / "round=000", tmp_path / "test.parquet", "label")


NAMES = ["weight", "alpha", "candidates", "gain", "teacher_margin", "example_id", "pool_row", "inclusion_probability"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("setting", ["student.input.columns", "teacher.input.columns", "data.carry", "data.label"])
def test_names_of_ours_are_refused_where_they_are_read(
    problem: dict[str, Any], tmp_path: Path, name: str, setting: str
) -> None:
    section, _, key = setting.partition(".")
    match key:
        case "input.columns":
            problem[section]["input"]["columns"] = ["x", name]
        case "carry":
            problem["data"]["carry"] = [name]
        case _:
            problem["data"]["label"] = name
    with pytest.raises(
        ValueError, match=rf"^{setting}: the column {name} has a name that soft labels use .*; rename it"
    ):
        run(problem, base=tmp_path)


def test_such_a_column_that_nobody_reads_is_fine(problem: dict[str, Any], tmp_path: Path) -> None:
    for file in (tmp_path / "pool").iterdir():
        table = pq.read_table(file)
        pq.write_table(table.append_column("weight", pa.array(np.arange(table.num_rows))), file)
    root = run(problem, base=tmp_path, until=("label", 0))
    shard = next((root / "labels" / "round=000").glob("*.parquet"))
    assert pq.read_schema(shard).field("weight").type == pa.float32(), "the estimate"


def test_a_labelling_job_refuses_them_too_but_for_weights_of_ones_own(problem: dict[str, Any], tmp_path: Path) -> None:
    def job(carry: list[str], read: list[str], id_column: str = "key") -> LabellingJob:
        config = {
            "data": {"pool": "pool", "id": id_column, "carry": carry, "num_classes": 3},
            "teacher": {**problem["teacher"], "input": {"columns": read}},
        }
        return LabellingJob(parse_label_config(config).relative_to(tmp_path), RunDirectory(tmp_path / "job"))

    for carry, read, id_column, setting in (
        (["x", "gain"], ["x"], "key", "data.carry: the column gain"),
        (["x", "weight"], ["x", "weight"], "key", "teacher.input.columns: the column weight"),
        (["teacher_margin"], ["x"], "key", "data.carry: the column teacher_margin"),
        (["x"], ["x"], "pool_row", "data.id: the column pool_row"),
    ):
        with pytest.raises(ValueError, match=f"^{setting} has a name that soft labels use"):
            job(carry, read, id_column)
    job(["x", "weight"], ["x"])
    job(["x"], ["x"], "example_id")
    with pytest.raises(ValueError, match=r"^spec.carried: the column gain has a name"):
        LabelExamples(problem["teacher"], SoftLabelSpec(3, carried=("gain",)))


def test_changed_rows_of_a_labelled_set_are_noticed_whatever_the_footer_says(
    problem: dict[str, Any], tmp_path: Path
) -> None:
    run(problem, base=tmp_path, until=("train", 0))
    frozen = tmp_path / "run" / "frozen.json"
    before = json.loads(frozen.read_text())
    table = make_table(*SETS["validation"], labelled=True)
    labels = table["label"].to_pylist()
    labels[5] = (labels[5] + 1) % 3
    pq.write_table(table.set_column(2, "label", pa.array(labels)), tmp_path / "validation.parquet")
    inputs = load_inputs(parse_config(problem).relative_to(tmp_path))
    # a footer that does not show it: the digests of the files are those that were recorded
    frozen.write_text(json.dumps({**before, "inputs": inputs.files_digest}))
    with pytest.raises(ValueError, match=r"the data changed since .*run was started: data.validation; put it back"):
        run(problem, base=tmp_path)
    # the same rows in another file are the same set
    pq.write_table(make_table(*SETS["validation"], labelled=True), tmp_path / "validation.parquet", compression="zstd")
    run(problem, base=tmp_path, until=("train", 0))


def test_a_run_of_an_earlier_version_goes_on_and_says_what_cannot_be_told(
    problem: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(problem, base=tmp_path, until=("train", 0))
    frozen = tmp_path / "run" / "frozen.json"
    now = json.loads(frozen.read_text())
    frozen.write_text(json.dumps({name: now[name] for name in ("inputs", "files", "teacher", "classes")}))
    run(problem, base=tmp_path, until=("select", 0))
    assert "whether they were changed until now cannot be told" in caplog.text
    assert json.loads(frozen.read_text()) == now
    caplog.clear()
    run(problem, base=tmp_path, until=("label", 0))
    assert caplog.text == ""


def test_what_is_said_of_the_sets(tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    pool, validation = make_table(240, 1, labelled=False), make_table(*SETS["validation"], labelled=True)
    labelled = pa.concat_tables([validation.slice(0, 4), make_table(11, 2, labelled=True)])
    pq.write_table(labelled.filter(pc.not_equal(labelled["label"], 2)), tmp_path / "labelled.parquet")
    known = pool.slice(0, 5).append_column("label", pa.array([0, 1, 0, 1, 0]))
    pq.write_table(pa.concat_tables([make_table(*SETS["test"], labelled=True), known]), tmp_path / "test.parquet")
    shared = pc.sum(pc.not_equal(validation["label"].slice(0, 4), 2)).as_py()
    notes = notes_on(load_inputs(parse_config(problem).relative_to(tmp_path)))
    assert notes == [
        "data.validation has 60 rows: shares are known to ± 13 points, the teacher's mistakes too",
        "data.labelled has no row of 1 of the 3 classes (2): the first student cannot know them",
        f"{shared} of the 60 rows of data.validation are in data.labelled too: checkpoints are chosen by what was learned",
        "5 of the 85 rows of data.test are in the pool: a student may be judged by what it learned",
    ]
    out = io.StringIO()
    run(problem, base=tmp_path, until=("train", 0), display=Display(Console(file=out, width=300)))
    assert all(f"note: {note}" in out.getvalue() for note in notes)


def test_ids_in_two_sets_and_one_input_with_two_classes(problem: dict[str, Any], tmp_path: Path) -> None:
    inputs = parse_config(problem).relative_to(tmp_path)
    labelled, validation = (make_table(*SETS[name], labelled=True) for name in ("labelled", "validation"))
    other = make_table(3, 9, labelled=True)
    edited = other.set_column(0, "key", labelled["key"].slice(0, 3))
    turned = labelled.slice(7, 2).set_column(
        2, "label", pa.array([(y + 1) % 3 for y in labelled["label"][7:9].to_pylist()])
    )
    pq.write_table(pa.concat_tables([labelled, turned]), tmp_path / "labelled.parquet")
    pq.write_table(pa.concat_tables([validation, edited]), tmp_path / "validation.parquet")
    notes = notes_on(load_inputs(inputs), "key")
    assert (
        "4 of the 17 rows of data.labelled have the input of another row of it and another class: at most one of them is right"
        in notes
    )
    assert (
        "3 of the 63 ids of data.validation are in data.labelled too, with another content: one row that was edited, or two that share "
        "an id" in notes
    )
    assert not any("ids of data.test" in note for note in notes)
    assert not any("ids of" in note for note in notes_on(load_inputs(inputs)))  # no column of ids is named
    assert not any("ids of" in note for note in notes_on(load_inputs(inputs), "none"))  # it is not in the sets


@pytest.mark.parametrize("name", ["validation", "test"])
def test_a_set_that_is_the_labelled_set_is_refused(problem: dict[str, Any], tmp_path: Path, name: str) -> None:
    require_different_sets(load_inputs(parse_config(problem).relative_to(tmp_path)))
    problem["data"][name] = problem["data"]["labelled"]
    rows = pq.read_metadata(tmp_path / problem["data"]["labelled"]).num_rows
    with pytest.raises(ValueError, match=rf"^data.{name} must not be data.labelled: all of its {rows} rows are there"):
        require_different_sets(load_inputs(parse_config(problem).relative_to(tmp_path)))


def test_numbers_that_could_be_names_and_indices_need_a_word(problem: dict[str, Any], tmp_path: Path) -> None:
    problem["data"]["classes"] = ["2", "0", "1"]
    with pytest.raises(
        ValueError, match=r"^data.label: column label: 0 is the name of a class and also the index of class '2'"
    ):
        load_inputs(parse_config(problem).relative_to(tmp_path))
    problem["data"]["integers"] = "indices"
    assert load_inputs(parse_config(problem).relative_to(tmp_path)).validation.truth.tolist() == truth()
    problem["data"]["integers"] = "names"
    assert load_inputs(parse_config(problem).relative_to(tmp_path)).validation.truth.tolist() == [
        (1, 2, 0)[y] for y in truth()
    ]


def test_a_run_whose_data_were_refused_takes_the_corrected_configuration(
    problem: dict[str, Any], tmp_path: Path
) -> None:
    problem["data"]["label"] = "truth"
    with pytest.raises(ValueError, match=r"data.labelled has no column truth"):
        run(problem, base=tmp_path)
    problem["data"]["label"] = "label"
    teacher = problem["teacher"]
    problem["teacher"] = {"kind": "torch", "model": "gone.pt2", "input": {"columns": ["x"]}}
    with pytest.raises(ValueError, match=r"gone.pt2"):
        run(problem, base=tmp_path)
    problem["teacher"] = teacher
    run(problem, base=tmp_path, until=("train", 0))
    problem["data"]["classes"] = ["0", "1", "2"]
    with pytest.raises(ValueError, match=r"was made by another configuration; it differs in data.classes"):
        run(problem, base=tmp_path, until=("train", 0))


def test_what_is_carried_from_the_pool_need_not_be_in_the_labelled_sets(
    problem: dict[str, Any], tmp_path: Path
) -> None:
    for file in (tmp_path / "pool").iterdir():
        table = pq.read_table(file)
        pq.write_table(table.append_column("title", pa.array([f"t{i}" for i in range(table.num_rows)])), file)
    problem["data"]["carry"] = ["title"]
    root = run(problem, base=tmp_path, until=("label", 0))
    assert "title" in pq.read_schema(next((root / "labels" / "round=000").glob("*.parquet"))).names
    assert "title" not in pq.read_schema(next((root / "teacher" / "validation").glob("*.parquet"))).names
