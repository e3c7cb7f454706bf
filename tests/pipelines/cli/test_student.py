"""export, tune, pareto and the evaluation of a directory, over a small finished run."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tomli_w
from problem import CLASSES, make_table, write_problem
from typer.testing import CliRunner

from distilbeam.inputs.config import InputConfig
from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import load_config
from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.experiments import pareto
from distilbeam.pipelines.experiments.evaluate import evaluate_directory
from distilbeam.pipelines.experiments.exports import write_exports
from distilbeam.pipelines.experiments.model_metrics import pool_examples
from distilbeam.pipelines.experiments.pareto import plan_sweep, sweep_widths
from distilbeam.pipelines.experiments.tune import tune, with_settings
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.pool.pool_files import find_files
from distilbeam.pipelines.pool.splits import plan_units
from distilbeam.pipelines.steps import run
from distilbeam.student.checkpoint import load_student
from distilbeam.student.evaluation.metrics import evaluate

FOOTPRINT = {
    "latency_ms_batch1": 1.0,
    "latency_ms_batch1_p95": 2.0,
    "latency_ms_batch64": 3.0,
    "latency_ms_batch64_p95": 4.0,
    "peak_memory_bytes": 5,
    "memory_bytes": 6,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one round, and its configuration."""
    directory = tmp_path_factory.mktemp("finished")
    settings = write_problem(directory)
    settings["run"]["rounds"] = 1
    settings["student"]["hidden"] = [16]
    settings["selection"]["compare_uniform"] = False
    settings["tune"] = {"trials": 6, "startup": 3, "space": {"training.lr": {"low": 1e-3, "high": 0.1, "log": True}}}
    settings["pareto"] = {"widths": [0.5], "compressions": ["int8"]}
    (directory / "c.toml").write_text(tomli_w.dumps(settings))
    run(directory / "c.toml")
    return directory


@pytest.fixture
def config(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy" / "c.toml"


@pytest.fixture
def measured_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "distilbeam.pipelines.experiments.model_metrics.measure",
        lambda directory, repeats: dict(FOOTPRINT),  # noqa: ARG005
    )


def run_of(config: Path, **changes: Any) -> Run:
    settings = with_settings(load_config(config), changes)
    return Run(settings.relative_to(config.parent), RunDirectory(config.parent / "run"))


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def refusal(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert isinstance(result.exception, ValueError), result.output
    return str(result.exception)


@pytest.mark.slow
@pytest.mark.usefixtures("measured_in_no_time")
def test_exports_of_a_run_in_one_table_and_in_the_report(config: Path) -> None:
    formats = ["--format", "pt2", "--format", "int8", "--format", "pruned"]
    out = invoke("export", config, *formats)
    assert out.exit_code == 0, out.exception
    for row in ("student", "pt2", "int8", "pruned"):
        assert f"\n {row} " in out.output
    where = config.parent / "run/exports/round=001"
    folders = [line.removeprefix("Export: ") for line in out.output.splitlines() if line.startswith("Export: ")]
    assert folders == [str(where / name) for name in ("pt2", "int8", "pruned")]
    assert all(any(Path(folder).glob("*.json")) for folder in folders)
    rows = {row["name"]: row for row in json.loads((where / "results.json").read_text())["rows"]}
    assert list(rows) == ["student", "pt2", "int8", "pruned"]
    student = load_student(config.parent / "run/students/round=001")
    test = pq.read_table(config.parent / "test.parquet")
    expected = evaluate(student.logits(test.combine_chunks().to_batches()[0]), test["label"].to_numpy())
    assert rows["student"]["test"]["accuracy"] == expected["accuracy"] == rows["pt2"]["test"]["accuracy"]
    assert rows["pt2"]["test"]["nll"] == pytest.approx(expected["nll"], abs=1e-5)
    assert rows["int8"]["test"]["nll"] == pytest.approx(expected["nll"], abs=0.05)
    assert rows["pruned"]["parameters"] == 8 * 4 + 8 + 8 * CLASSES + CLASSES  # 16 hidden units became 8
    assert all(row["test"]["agreement"] > 0.3 for row in rows.values())
    assert all(row["latency_ms_batch64_p95"] == 4.0 for row in rows.values())
    description = json.loads((where / "int8/export.json").read_text())
    assert description["examples"] == {"rows": 240, "pool": "pool", "seed": 0}
    soft_labels = description["provenance"]["soft_labels"]
    assert soft_labels["datasets"] == ["labels/round=000"]
    assert soft_labels["spec"]["num_classes"] == CLASSES
    assert soft_labels["spec"]["teacher"].startswith("torch:logging_teacher:LoggingTeacher:")
    report = (config.parent / "run/report/report.html").read_text()
    assert "<h2>Exports</h2>" in report
    assert "<td>int8</td>" in report

    before = (where / "int8/model.onnx").stat().st_mtime_ns
    again = invoke("export", config, "--format", "int8")
    assert "pruned" in again.output  # what is there stays in the table
    assert (where / "int8/model.onnx").stat().st_mtime_ns == before
    assert "holds another student, or one of another --ratio, in the format pruned" in refusal(
        "export", config, "--format", "pruned", "--ratio", "0.25"
    )
    shutil.rmtree(config.parent / "run/students/round=001")
    shutil.copytree(config.parent / "run/students/round=000", config.parent / "run/students/round=001")
    assert "holds another student" in refusal("export", config, "--format", "int8")


@pytest.mark.slow
def test_a_report_of_many_classes_folds_all_but_the_worst(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distilbeam.pipelines.report.html.CLASSES_SHOWN", 2)
    assert invoke("report", config).exit_code == 0
    report = (config.parent / "run/report/report.html").read_text()
    before, _, folded = report.partition("<h2>Classes</h2>")[2].partition("<h2>Plots")[0].partition("<details>")
    assert before.count("<tr><td>") == 2
    assert f"the other {CLASSES - 2} of {CLASSES} classes" in folded
    assert folded.count("<tr><td>") == CLASSES - 2


@pytest.mark.slow
def test_a_directory_is_exported_and_evaluated(config: Path, tmp_path: Path) -> None:
    student = config.parent / "run/students/round=001"
    assert "int8 needs examples to calibrate on: give it some of the pool with --calibrate" in refusal(
        "export", student
    )
    out = invoke("export", student, "--format", "int8", "--calibrate", config.parent / "pool")
    assert out.exit_code == 0, out.exception
    assert "Quality" not in out.output
    exported = student.with_name("round=001-exports") / "int8"
    figures = tmp_path / "figures.json"
    data = ["--data", config.parent / "test.parquet"]
    out = invoke("evaluate", exported, *data, "--teacher", config, "--json", figures)
    assert out.exit_code == 0, out.exception
    found = json.loads(figures.read_text())
    assert found["data"]["examples"] == 80
    assert sum(row["examples"] for row in found["classes"]) == 80
    right = sum(row["examples"] * row["recall"] for row in found["classes"])
    assert right / 80 == pytest.approx(found["data"]["accuracy"])
    assert 0 < found["data"]["agreement"] < 1
    assert 0 < found["memory_bytes"] < found["peak_memory_bytes"]  # measured in a fresh process
    whole = json.loads((config.parent / "run/report/metrics.json").read_text())["students"][-1]
    assert found["data"]["accuracy"] == pytest.approx(whole["accuracy"], abs=0.03)
    assert found["data"]["agreement"] == pytest.approx(whole["agreement"], abs=0.03)
    stored = config.parent / "run/teacher/test"
    assert evaluate_directory(exported, data[1], "label", None, stored)["data"] == found["data"]
    with pytest.raises(
        ValueError, match=r"must be dense soft labels of the 60 rows of --data, .* has 80 of kind dense"
    ):
        evaluate_directory(exported, config.parent / "validation.parquet", "label", None, stored)


def test_what_export_and_evaluate_refuse(config: Path, tmp_path: Path) -> None:
    student = config.parent / "run/students/round=001"
    formats = "pt2, onnx, int8, int8-weights, pruned"
    assert refusal("export", student, "--format", "tflite") == f"--format must be one of {formats}, got tflite"
    assert "--data is for a student's directory" in refusal("export", config, "--data", tmp_path)
    assert "--set and --round are for a configuration" in refusal("export", student, "--round", "1")
    assert "has no student of round 7 yet" in refusal("export", config, "--round", "7")
    assert "must be trained again: name the run's configuration" in refusal("export", student, "--format", "pruned")
    assert refusal("evaluate", student).startswith("--data must name labelled Parquet to evaluate")
    assert "must hold a student (student.json) or an export" in refusal("evaluate", tmp_path, "--data", tmp_path)
    assert "--data must name Parquet files" in refusal("evaluate", student, "--data", tmp_path / "none.parquet")
    assert "label column 'y' must be one of" in refusal(
        "evaluate", student, "--data", config.parent / "test.parquet", "--label", "y"
    )
    assert "--data, --teacher and --answers are for a student's directory" in refusal(
        "evaluate", config, "--data", tmp_path
    )


def test_calibration_examples_are_rows_of_the_pool(finished: Path) -> None:
    pool = plan_units(find_files(finished / "pool"), 40)
    found = pool_examples(pool, InputConfig(columns=("x",)), 100, 3)
    assert found.shape == (100, 4)
    every = np.array(make_table(240, 1, labelled=False)["x"].to_pylist(), np.float32)
    rows = [int(np.flatnonzero((every == row).all(axis=1))[0]) for row in found]
    assert len(set(rows)) == 100
    assert np.array_equal(found, pool_examples(pool, InputConfig(columns=("x",)), 100, 3))
    assert not np.array_equal(found, pool_examples(pool, InputConfig(columns=("x",)), 100, 4))
    assert len(pool_examples(pool, InputConfig(columns=("x",)), 10_000, 3)) == 240


def test_tune_writes_settings_that_a_run_takes(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = tune(run_of(config), Display.silent())
    root = config.parent / "run/tune"
    values = [trial.value for trial in undisturbed.trials if trial.state == "complete"]
    assert undisturbed.best.value == min(values)
    overlay = tomllib.loads((root / "best.toml").read_text())
    assert overlay == {"training": {"lr": undisturbed.best.settings["training.lr"]}}
    assert load_config(config, [f"@{root / 'best.toml'}"]).training.lr == overlay["training"]["lr"]
    assert len(json.loads((root / "results.json").read_text())["trials"]) == 6
    assert len({trial.settings["training.lr"] for trial in undisturbed.trials}) == 6
    for trial in undisturbed.trials:  # the epochs before the last were seen while it trained
        assert trial.state == "cut" or trial.epochs == 2

    shutil.rmtree(root)
    whole, calls = Run.train, []

    def killed(self: Run, *arguments: Any, **others: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(self, *arguments, **others)

    monkeypatch.setattr(Run, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(run_of(config), Display.silent())
    assert tune(run_of(config), Display.silent()) == undisturbed
    assert len(calls) == 7
    with pytest.raises(ValueError, match=r"belongs to another search, which differs in training\."):
        tune(run_of(config, **{"training.batch_size": 7}), Display.silent())


def test_a_trial_that_ended_before_the_search_learned_of_it_is_learned_from(config: Path) -> None:
    """The process was killed between a training's last rename and the journal's line."""
    undisturbed = tune(run_of(config), Display.silent())
    (config.parent / "run/tune/journal.log").unlink()
    trained = {path.name: path.stat().st_mtime_ns for path in (config.parent / "run/tune/trials").iterdir()}
    assert tune(run_of(config), Display.silent()) == undisturbed
    kept = {path.name: path.stat().st_mtime_ns for path in (config.parent / "run/tune/trials").iterdir()}
    assert kept == trained  # what was trained was not trained again


def test_exports_that_cannot_be_are_refused_before_others_take_their_time(config: Path) -> None:
    settings = run_of(config)
    student, output = settings.last_student(), config.parent / "exports"

    def write(ratio: float, retrain: Any) -> None:
        write_exports(student, ["pt2", "pruned"], output, lambda _: {}, Display.silent(), retrain=retrain, ratio=ratio)

    with pytest.raises(ValueError, match="--ratio must be a share of the channels between 0 and 1, got 2"):
        write(2, lambda *_: None)
    with pytest.raises(ValueError, match="a pruned student must be trained again: name the run's configuration"):
        write(0.5, None)
    assert not output.exists()


def test_exports_begin_by_removing_what_a_killed_one_left(config: Path) -> None:
    output = config.parent / "exports"
    (output / ".pt2.8f3a.tmp").mkdir(parents=True)
    write_exports(run_of(config).last_student(), ["pt2"], output, lambda _: {}, Display.silent())
    assert sorted(path.name for path in output.iterdir()) == [".lock", "pt2", "results.json"]


def test_what_tune_refuses(config: Path) -> None:
    for name, sentence in (
        ("engine.threads", r"tune.space may hold settings of \[student\] and \[training\], got engine.threads"),
        ("training.lrr", "training.lrr is not a setting; did you mean training.lr?"),
        ("training.weight_decay", "training.weight_decay: must be greater than or equal to 0, got -1"),
    ):
        space = {name: {"low": -1.0, "high": 2.0}}
        with pytest.raises(ValueError, match=sentence):
            tune(run_of(config, tune={"space": space}), Display.silent())


@pytest.mark.slow
@pytest.mark.usefixtures("measured_in_no_time")
def test_a_stopped_sweep_goes_on_and_its_front_is_in_the_report(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, made = pareto._make, []

    def killed(stage: Any, *others: Any) -> Any:
        made.append(stage.name)
        if len(made) == 4:
            raise KeyboardInterrupt
        return whole(stage, *others)

    monkeypatch.setattr(pareto, "_make", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep_widths(run_of(config), Display.silent())
    results = sweep_widths(run_of(config), Display.silent())
    assert made == [*made[:4], made[3], *made[5:]]
    assert len(set(made)) == len(made) - 1 == 6
    assert sweep_widths(run_of(config), Display.silent()) == results
    assert len(made) == 7  # nothing is made twice

    points = {point["name"]: point for point in results["points"]}
    assert "improved-1" not in points  # only grown to be shrunk
    # 4 inputs, 8 or 16 hidden units, 3 classes
    assert points["shrunk-0.5"]["parameters"] == points["pruned-0.5"]["parameters"] == 8 * 4 + 8 + 3 * 8 + 3
    assert load_student(config.parent / "run/pareto/improved-1").num_parameters == 16 * 4 + 16 + 3 * 16 + 3
    soft = load_student(config.parent / "run/pareto/improved-1").extra["metrics"]
    hard = load_student(config.parent / "run/pareto/shrunk-0.5").extra["metrics"]
    assert (soft["soft_rows"], soft["hard_rows"], hard["soft_rows"], hard["hard_rows"]) == (30, 15, 0, 15)
    assert {point["strategy"] for point in results["points"] if point["form"] == "int8"} == {
        "shrink-and-improve",
        "grow-improve-and-shrink",
    }
    best = max(point["accuracy"] for point in results["points"])
    assert [p["accuracy"] for p in results["points"] if p["on_front"]].count(best) >= 1
    assert all({"test_accuracy", "agreement", "latency_ms_batch1"} <= set(point) for point in results["points"])

    assert (config.parent / "run/pareto/pareto.png").stat().st_size > 10_000
    assert invoke("report", config).exit_code == 0
    report = (config.parent / "run/report/report.html").read_text()
    assert "<h2>Quality against footprint</h2>" in report
    assert "<td>pruned-0.5-int8</td>" in report
    assert "(pareto.png)" in report
    assert "<h2>Classes</h2>" in report
    with pytest.raises(
        ValueError,
        match=r"was made with other settings, which differ in training\..* Set these back, or remove the directory",
    ):
        sweep_widths(run_of(config, **{"training.epochs": 4}), Display.silent())


def test_what_a_sweep_would_make(config: Path) -> None:
    run = run_of(config)
    said = plan_sweep(run)
    assert said.startswith("6 students, 0 there already; 4 would be trained and 2 compressed: shrunk-0.5, ")
    (root := run.directory.root / "pareto").mkdir(exist_ok=True)
    (root / "shrunk-0.5.json").write_text("{}")
    assert plan_sweep(run).startswith(
        "6 students, 1 there already; 3 would be trained and 2 compressed: improved-0.5, "
    )
    out = invoke("pareto", config, "--dry-run")
    assert " ".join(out.output.split()).endswith(plan_sweep(run))


def test_what_a_sweep_refuses(config: Path) -> None:
    for changes, sentence in (
        (
            {"student.kind": "linear"},
            "a sweep needs a student with a width, which are mlp, cnn, .* got student.kind 'linear'",
        ),
        ({"pareto.grow": 16.0, "student.width": 4.0}, "must have a width of at most 16, got 32"),
        ({"student.residual": "laurel-rw", "student.hidden": [4, 4]}, "or set pareto.strategies = "),
    ):
        with pytest.raises(ValueError, match=sentence):
            sweep_widths(run_of(config, **changes), Display.silent())
    shutil.rmtree(config.parent / "run/labels")
    with pytest.raises(ValueError, match=r"but no round of .* is labelled yet; 'distilbeam label CONFIG'"):
        sweep_widths(run_of(config), Display.silent())
