"""A run goes on with more rounds, and with other students on the labels that are there: no answer is bought twice."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w
from problem import asked, make_table
from typer.testing import CliRunner

from distilbeam.pipelines import run
from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import LabelConfig, load_any_config, load_config, parse_config
from distilbeam.pipelines.experiments.further_students import train_further
from distilbeam.pipelines.jobs.freeze import require_data_of_run
from distilbeam.pipelines.jobs.opening import opened_run, planned_run
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.jobs.variants import VariantDirectory
from distilbeam.progress import Progress
from distilbeam.settings import read_toml
from distilbeam.storage.files import read_json
from distilbeam.student.checkpoint import load_student

WIDER = {"student.hidden": [12]}


def changed(problem: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(dict(problem))
    for name, value in settings.items():
        section, key = name.split(".")
        data.setdefault(section, {})[key] = value
    return data


def fingerprint(student: Path) -> str:
    return load_student(student).fingerprint()


def asked_of_pool(directory: Path) -> Counter[str]:
    pool = {np.float32(x).tobytes().hex() for x in make_table(240, 1, labelled=False)["x"].to_pylist()}
    return Counter(row for row in asked(directory) if row in pool)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture
def finished(problem: dict[str, Any], tmp_path: Path) -> Path:
    return run(problem, base=tmp_path)


def test_more_rounds_end_as_a_run_that_had_them_from_the_start(problem, tmp_path):
    problem = changed(problem, {"selection.compare_uniform": False})
    root = run(problem, base=tmp_path)
    labels = {r: contents(root / "labels" / f"round={r:03d}") for r in range(2)}
    run(changed(problem, {"run.rounds": 3}), base=tmp_path)
    assert {r: contents(root / "labels" / f"round={r:03d}") for r in range(2)} == labels
    assert max(asked_of_pool(tmp_path).values()) == 1
    assert load_config(root / "config.toml").run.rounds == 3

    fresh = run(changed(problem, {"run.rounds": 3, "run.directory": "fresh"}), base=tmp_path)
    for number in range(4):
        assert fingerprint(root / f"students/round={number:03d}") == fingerprint(fresh / f"students/round={number:03d}")
    figures, expected = (read_json(path / "report" / "metrics.json") for path in (root, fresh))
    for row, other in zip(figures["students"], expected["students"], strict=True):
        assert (row["name"], row["labels"], row["accuracy"]) == (other["name"], other["labels"], other["accuracy"])
    assert "student, round 3" in (root / "report" / "report.html").read_text()


def test_more_rounds_are_compared_with_as_many_labels(problem, finished, tmp_path):
    former = contents(finished / "uniform")
    run(changed(problem, {"run.rounds": 3}), base=tmp_path)
    assert read_json(finished / "report" / "metrics.json")["uniform"]["labels"] == 90
    assert contents(finished / "uniform") == former
    assert (finished / "uniform-90" / "students" / "round=001").exists()
    assert (
        max(asked_of_pool(tmp_path).values()) == 1
    )  # what the comparison has bought serves the third round, and the reverse


@pytest.mark.slow
def test_fewer_rounds_are_reported_again_and_nothing_is_asked(problem, finished, tmp_path):
    before = read_json(finished / "report" / "metrics.json")
    run(changed(problem, {"run.rounds": 3}), base=tmp_path)
    run(problem, base=tmp_path)
    after = read_json(finished / "report" / "metrics.json")
    assert [row["accuracy"] for row in after["students"]] == [row["accuracy"] for row in before["students"]]
    assert after["uniform"]["accuracy"] == before["uniform"]["accuracy"]
    assert "student, round 3" not in (finished / "report" / "report.html").read_text()
    assert max(asked_of_pool(tmp_path).values()) == 1


@pytest.mark.slow
def test_the_comparison_may_be_left_out_and_come_later(problem, tmp_path):
    without = changed(problem, {"selection.compare_uniform": False})
    root = run(without, base=tmp_path)
    assert "uniform" not in read_json(root / "report" / "metrics.json")
    run(problem, base=tmp_path)
    assert read_json(root / "report" / "metrics.json")["uniform"]["labels"] == 60
    assert max(asked_of_pool(tmp_path).values()) == 1


@pytest.mark.parametrize("settings", [WIDER, {"training.lr": 0.02}, {"student.kind": "linear"}])
def test_another_student_learns_from_the_labels_that_are_there(problem, finished, tmp_path, settings):
    own, chosen, bought = contents(finished / "students"), contents(finished / "selected"), asked_of_pool(tmp_path)
    config = (finished / "config.toml").read_bytes()
    root = run(changed(problem, settings), base=tmp_path)
    assert root.parent == finished / "variants"
    assert asked_of_pool(tmp_path) == bought
    assert contents(finished / "students") == own
    assert contents(finished / "selected") == chosen
    assert (finished / "config.toml").read_bytes() == config
    assert sorted(path.name for path in (root / "students").iterdir()) == ["round=002"]
    assert not (root / "selected").exists()

    figures, of_run = (read_json(path / "report" / "metrics.json") for path in (root, finished))
    assert [(row["name"], row["labels"]) for row in figures["students"]] == [("student, round 2", 60)]
    assert figures["own"]["accuracy"] == of_run["students"][-1]["accuracy"]
    assert figures["calls"]["labels"] == of_run["calls"]["labels"] == 60
    (name, value), *_ = settings.items()
    assert f"Another student than that of {finished}: {name} (" in figures["variant"]
    assert f"{value!r} now)" in figures["variant"]
    page = (root / "report" / "report.html").read_text().replace("&#39;", "'")
    after, own = figures["students"][-1]["accuracy"], figures["own"]["accuracy"]
    assert f'<p class="lead">{after:.1%} after 2 rounds; the run\'s own student has {own:.1%}, the teacher has' in page
    assert f"Another student than that of {finished}" in page
    first = (finished / "report" / "report.html").read_text()
    assert f"{of_run['students'][0]['accuracy']:.1%} before, {own:.1%} after 2 rounds; the teacher has" in first


def test_another_student_is_that_of_a_training_on_the_same_labels(problem, finished, tmp_path):
    """What is made beside the run is what the run itself would have made of these labels."""
    root = run(changed(problem, WIDER), base=tmp_path)
    settings = parse_config(changed(problem, WIDER))
    with opened_run(settings.relative_to(tmp_path)) as directory:
        of_run = Run(settings.relative_to(tmp_path), directory)
        assert [str(path.relative_to(finished)) for path in of_run.soft_labels] == [
            "labels/round=000",
            "labels/round=001",
        ]
        train_further(of_run, settings.student, settings.training, tmp_path / "again", Progress())
        assert of_run.last_student() == root / "students" / "round=002"
        assert of_run.provenance(root / "students" / "round=002")["soft_labels"]["datasets"] == [
            "labels/round=000",
            "labels/round=001",
        ]
    assert fingerprint(tmp_path / "again") == fingerprint(root / "students" / "round=002")


def test_another_student_goes_on_and_the_run_does_too(problem, finished, tmp_path):
    other = run(changed(problem, WIDER), base=tmp_path)
    assert run(changed(problem, WIDER | {"run.rounds": 3}), base=tmp_path) == other
    assert sorted(path.name for path in (other / "labels").glob("round=???")) == ["round=002"]
    plan = read_json(other / "selected" / "round=002" / "plan.json")
    assert plan["digests"]["student"] == fingerprint(other / "students" / "round=002")
    assert not (finished / "selected" / "round=002").exists()
    assert max(asked_of_pool(tmp_path).values()) == 1

    run(changed(problem, {"run.rounds": 3}), base=tmp_path)
    assert max(asked_of_pool(tmp_path).values()) == 1
    assert (finished / "labels" / "round=002").exists()
    before = contents(other)
    assert run(changed(problem, WIDER | {"run.rounds": 3}), base=tmp_path) == other
    assert contents(other) == before  # its third round stays its own


@pytest.mark.slow
def test_a_run_that_was_stopped_keeps_its_labels_for_another_student(problem, tmp_path):
    root = run(problem, base=tmp_path, until=("label", 0))
    first = asked_of_pool(tmp_path)
    assert sum(first.values()) == 30
    other = run(changed(problem, {"training.epochs": 4}), base=tmp_path)
    assert max(asked_of_pool(tmp_path).values()) == 1
    assert sorted(path.name for path in (other / "students").iterdir()) == ["round=001", "round=002"]
    assert sorted(path.name for path in (other / "labels").glob("round=???")) == ["round=001"]
    assert (root / "labels" / "round=000").exists()


@pytest.mark.slow
def test_pooled_labels_are_those_of_the_student_that_chose(problem, finished, tmp_path):
    root = run(changed(problem, {"labels.pooled": True}), base=tmp_path)
    assert root.parent == finished / "variants"
    fresh = run(changed(problem, {"labels.pooled": True, "run.directory": "fresh", "run.rounds": 1}), base=tmp_path)
    ours = pq.read_table(root / "pooled" / "round=000", columns=["example_id", "teacher_logprobs"]).sort_by(
        "example_id"
    )
    theirs = pq.read_table(fresh / "pooled" / "round=000", columns=["example_id", "teacher_logprobs"]).sort_by(
        "example_id"
    )
    assert ours.equals(theirs)  # the first round was chosen by the same student in both


@pytest.mark.usefixtures("finished")
def test_a_student_that_reads_what_no_label_carries_is_refused(problem, tmp_path):
    problem["student"]["input"] = {"kind": "text", "columns": ["key"], "buckets": 16}
    problem["student"]["kind"] = "linear"
    with pytest.raises(
        ValueError,
        match=r"student.input.columns must be among the columns x that the labels of .*run carry, got key; choose",
    ):
        run(problem, base=tmp_path)


def test_the_choice_may_change_until_it_was_used(problem, tmp_path):
    run(problem, base=tmp_path, until=("train", 0))
    other = changed(problem, {"selection.budget": 20, "selection.method": "greedy"})
    root = run(other, base=tmp_path, until=("label", 0))
    assert sum(asked_of_pool(tmp_path).values()) == 20
    with pytest.raises(ValueError, match=r"differs in selection.budget \(20 there, 30 now\); selection.method"):
        run(problem, base=tmp_path)
    assert load_config(root / "config.toml").selection.budget == 20


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"labels.temperature": 2.0}, "labels.temperature"),
        ({"labels.kind": "top_k", "labels.k": 2}, "labels.kind"),
        ({"data.carry": ["key"]}, "data.carry"),
        ({"run.seed": 1}, "run.seed"),
        ({"selection.gain": "entropy"}, "selection.gain"),
        ({"engine.shard_rows": 16}, "engine.shard_rows"),
    ],
)
def test_what_a_label_means_is_another_directory_and_the_way_on_is_said(problem, tmp_path, settings, name):
    run(problem, base=tmp_path, until=("select", 0))
    with pytest.raises(
        ValueError, match=rf"it differs in .*{name} .*Set these back, or .* More run.rounds, another \[student\]"
    ):
        run(changed(problem, settings), base=tmp_path)


@pytest.mark.slow
def labelling_job(problem: Mapping[str, Any], base: Path, directory: str) -> LabelConfig:
    (base / "label.toml").write_text(
        tomli_w.dumps(
            {
                "run": {"directory": directory},
                "data": {"pool": "pool", "id": "key", "carry": ["x"], "num_classes": 3},
                "teacher": problem["teacher"],
            }
        )
    )
    return cast("LabelConfig", load_any_config(base / "label.toml"))


def test_a_labelling_job_does_not_take_a_run_over(problem, finished, tmp_path):
    before = contents(finished)
    job = labelling_job(problem, tmp_path, "run")
    with pytest.raises(ValueError, match=r"run holds a run, and the configuration describes a labelling job \("):
        opened_run(job.relative_to(tmp_path)).__enter__()
    assert contents(finished) == {**before, ".lock": (finished / ".lock").read_bytes()}


def test_a_run_does_not_take_a_labelling_job_over(problem, tmp_path):
    with opened_run(labelling_job(problem, tmp_path, "job").relative_to(tmp_path)):
        pass
    with pytest.raises(
        ValueError, match=r"holds a labelling job \(.*\), and the configuration describes a run; choose"
    ):
        run(changed(problem, {"run.directory": "job"}), base=tmp_path)


def test_how_the_work_is_done_is_free(problem, finished, tmp_path):
    settings = {"engine.max_failures": 5, "engine.teacher_batch": 4, "engine.batch_rows": 20, "engine.threads": 1}
    assert run(changed(problem, settings), base=tmp_path) == finished
    assert load_config(finished / "config.toml").engine.max_failures == 5


def test_data_in_another_place_must_be_the_same(problem, finished, tmp_path):
    shutil.copytree(tmp_path / "pool", tmp_path / "copy")
    bought = asked_of_pool(tmp_path)
    assert run(changed(problem, {"data.pool": "copy"}), base=tmp_path) == finished
    assert asked_of_pool(tmp_path) == bought
    assert read_toml(finished / "config.toml")["data"]["pool"] == "copy"
    with opened_run(parse_config(problem).relative_to(tmp_path)) as directory:
        assert directory.moved == ("data.pool",)
        require_data_of_run(Run(parse_config(problem).relative_to(tmp_path), directory))  # back again, and the same
    pq.write_table(make_table(60, 9, labelled=False), tmp_path / "pool" / "2.parquet")
    for _ in range(2):  # nothing is left to do, and still
        with pytest.raises(ValueError, match=r"the data changed since .*run was started: pool file\(s\) 2.parquet"):
            run(problem, base=tmp_path)
    with (
        opened_run(parse_config(problem).relative_to(tmp_path)) as directory,
        pytest.raises(ValueError, match=r"data\.pool must lead to"),
    ):
        require_data_of_run(Run(parse_config(problem).relative_to(tmp_path), directory))


@pytest.mark.slow
def test_a_run_of_before_lacks_settings_and_goes_on(problem, finished, tmp_path):
    config = load_config(finished / "config.toml").dump()
    del config["selection"]["coverage"], config["engine"]["unit_rows"], config["engine"]["attempts"]
    config["engine"]["unit_rows"] = 40
    (finished / "config.toml").write_text(tomli_w.dumps(config))
    assert run(problem, base=tmp_path) == finished


def test_planning_makes_nothing_and_names_the_place(problem, finished, tmp_path):
    before = {path.name for path in finished.iterdir()}
    assert planned_run(parse_config(problem).relative_to(tmp_path)).root == finished
    place = planned_run(parse_config(changed(problem, WIDER)).relative_to(tmp_path))
    assert isinstance(place, VariantDirectory)
    assert place.root.parent.name == "variants"
    assert {path.name for path in finished.iterdir()} == before


@pytest.mark.slow
def test_the_commands_go_on_too(problem, finished, tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(problem))
    (tmp_path / "other.toml").write_text("[student]\nhidden = [10]\n[training]\nlr = 0.01\n")
    bought = asked_of_pool(tmp_path)

    def call(*words: str) -> str:
        result = CliRunner().invoke(app, list(words), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return " ".join(result.output.split())

    trained = call("train", str(tmp_path / "run.toml"), "--student", str(tmp_path / "other.toml"))
    assert "Another student than that of" in trained
    assert "Student of round 2: accuracy" in trained
    with pytest.raises(
        ValueError, match=r"--round must be 2 for train, got 1; --set run.rounds=1 learns from the labels of"
    ):
        call("train", str(tmp_path / "run.toml"), "--student", str(tmp_path / "other.toml"), "--round", "1")
    assert "from 60 labels of the teacher and 15 human ones. Its directory:" in trained
    own = call("train", str(tmp_path / "run.toml"))
    assert f"Its directory: {finished}/students/round=002" in own
    assert f"{finished}/students/round=000" in call("train", str(tmp_path / "run.toml"), "--round", "0")

    found = call("tune", str(tmp_path / "run.toml"), "--trials", "2", "--set", "training.epochs=3")
    best = finished / "tune" / "best.toml"
    assert f"distilbeam run {tmp_path / 'run.toml'} --set training.epochs=3 --set @{best}" in found
    again = call("run", str(tmp_path / "run.toml"), "--set", f"@{best}")
    assert again.count("Another student than that of") == 1
    assert "variants/mlp-" in again
    tuned = load_config(tmp_path / "run.toml", [f"@{best}"])
    root = planned_run(tuned).root
    assert load_student(root / "students" / "round=002").extra["training"]["lr"] == tuned.training.lr
    assert asked_of_pool(tmp_path) == bought
    assert np.isfinite(read_json(root / "report" / "metrics.json")["students"][-1]["nll"])
