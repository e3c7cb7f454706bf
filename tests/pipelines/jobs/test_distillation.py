"""The main job end to end, in process: what it leaves, what it says, what it refuses."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from problem import CLASSES, asked, labels_of, make_table
from rich.console import Console

from distilbeam.pipelines.engine import model_cache
from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.engine.phase import PhaseError
from distilbeam.pipelines.steps import run
from distilbeam.selection.trust.calibration import fit_temperature
from distilbeam.selection.trust.debias import DebiasEstimator
from distilbeam.student.checkpoint import load_student
from distilbeam.teacher.softlabels import compact_manifest, decode, read_manifest


def says(rows: pa.Table, temperature: float) -> np.ndarray:
    """What the teacher of the problem says of rows: log-probabilities [n, classes]."""
    x = rows["x"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
    logits = 2.5 * x[:, :CLASSES].astype(np.float64) / temperature
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_a_run_from_pool_to_report(problem: dict[str, Any], tmp_path: Path) -> None:
    root = run(problem, base=tmp_path)
    assert root == tmp_path / "run"
    pool = make_table(240, 1, labelled=False)
    bought = []
    for number in range(2):
        labels = labels_of(root / "labels" / f"round={number:03d}")
        assert labels.num_rows == 30
        bought += labels["pool_row"].to_pylist()
        # the rows are the pool's own, with the teacher's calibrated answer rounded to half precision
        rows = pool.take(labels["pool_row"])
        assert labels["example_id"].to_pylist() == rows["key"].to_pylist()
        np.testing.assert_array_equal(labels["x"].combine_chunks().flatten(), rows["x"].combine_chunks().flatten())
        manifest = read_manifest(root / "labels" / f"round={number:03d}")
        expected = says(rows, manifest.spec.temperature)
        np.testing.assert_allclose(decode(labels, manifest.spec).logprobs, expected, rtol=1e-3, atol=1e-3)
        for name, low, high in (("alpha", 0.5, 1), ("candidates", 1, CLASSES), ("weight", 0, 10), ("gain", 0, 1)):
            assert low <= pc.min(labels[name]).as_py() <= pc.max(labels[name]).as_py() <= high, name
        probability = labels["inclusion_probability"].to_numpy()
        assert 0 < probability.min() <= probability.max() <= 1
    assert len(set(bought)) == 60, "no row is bought twice"
    metrics = json.loads((root / "report" / "metrics.json").read_text())
    assert metrics["ran"] == "everything in float32; the loss by chunked"
    assert f"The last student&#39;s training ran {metrics['ran']}." in (root / "report" / "report.html").read_text()
    assert [s["labels"] for s in metrics["students"]] == [0, 30, 60]
    assert metrics["uniform"]["labels"] == 60
    assert metrics["calls"]["labels"] == metrics["calls"]["labelled"] == 60
    assert metrics["calls"]["saved"] == 240 - 60
    assert metrics["calls"]["validation"] == 60
    assert metrics["calls"]["test"] == 80
    # every call was for another row: the uniform comparison reused what was bought already
    log = asked(tmp_path)
    assert len(log) == 60 + 80 + 60 + metrics["calls"]["uniform"] + LATENCY_ROWS
    html = (root / "report" / "report.html").read_text()
    assert html.count("data:image/png;base64,") == 3
    assert "http" not in html.replace("http-equiv", ""), "the report opens offline"


LATENCY_ROWS = 12 * (1 + 60)  # the teacher's latency is measured by 12 calls with 1 row and 12 with up to 64


def test_marginals_are_the_games_and_the_budget_is_met(problem: dict[str, Any], tmp_path: Path) -> None:
    from distilbeam.selection.games.rad import rad_marginals

    root = run(problem, base=tmp_path, until=("select", 0))
    plan = json.loads((root / "selected" / "round=000" / "plan.json").read_text())
    files = sorted((root / "selected" / "round=000" / "gains").glob("*.parquet"))
    gains = np.concatenate([pq.read_table(f)["gain"].to_numpy() for f in files])
    rows = {
        (f.stem, r): i for i, (f, r) in enumerate((f, r) for f in files for r in pq.read_table(f)["row"].to_pylist())
    }
    assert len(gains) == plan["examples"] == 240
    exact = rad_marginals(gains.astype(np.float64), plan["wrong"], 30)
    assert plan["value"] == pytest.approx(exact.value, rel=1e-9)
    picks = [
        (f.stem, r) for f in (root / "selected/round=000/picks").glob("*.parquet") for r in pq.read_table(f).to_pylist()
    ]
    assert len(picks) == 30
    for uid, pick in picks:
        index = rows[uid, pick["row"]]
        assert pick["gain"] == gains[index]
        assert pick["inclusion_probability"] == pytest.approx(exact.probabilities[index], abs=1e-6)


@pytest.mark.parametrize("method", ["greedy", "uniform"])
def test_other_methods(problem: dict[str, Any], tmp_path: Path, method: str) -> None:
    problem["selection"] |= {"method": method, "compare_uniform": False}
    root = run(problem, base=tmp_path)
    labels = labels_of(root / "labels" / "round=000")
    assert labels.num_rows == 30
    if method == "greedy":
        files = (root / "selected" / "round=000" / "gains").glob("*.parquet")
        gains = np.sort(np.concatenate([pq.read_table(f)["gain"].to_numpy() for f in files]))[::-1]
        np.testing.assert_array_equal(np.sort(labels["gain"].to_numpy())[::-1], gains[:30])
    else:
        assert labels["gain"].null_count == 30
        np.testing.assert_allclose(labels["inclusion_probability"].to_numpy(), 30 / 240, rtol=1e-6)
    metrics = json.loads((root / "report" / "metrics.json").read_text())
    assert "uniform" not in metrics


@pytest.mark.parametrize("labels", [{"kind": "top_k", "k": 2}, {"kind": "sampled", "k": 20}, {"storage": "float16"}])
@pytest.mark.parametrize("objective", ["distill", "slam+weighted"])
def test_other_forms_of_labels(problem: dict[str, Any], tmp_path: Path, labels: dict[str, Any], objective: str) -> None:
    problem["run"]["rounds"] = 1
    problem["labels"] = labels
    if labels.get("kind", "dense") == "dense":
        problem["training"]["objective"] = objective
    root = run(problem, base=tmp_path)
    spec = read_manifest(root / "labels" / "round=000").spec
    assert (spec.kind, spec.storage) == (labels.get("kind", "dense"), labels.get("storage", "float32"))


def test_every_runner_writes_the_same_bytes(problem: dict[str, Any], tmp_path: Path) -> None:
    problem["run"]["rounds"] = 1
    checksums = []
    for name, flags in (("one", []), ("two", ["--direct_running_mode=multi_threading", "--direct_num_workers=2"])):
        problem["run"]["directory"] = name
        root = run(problem, base=tmp_path, beam_flags=flags)
        checksums.append([(e.key, e.checksum) for e in read_manifest(root / "labels" / "round=000").entries])
    assert checksums[0] == checksums[1]


def test_a_finished_run_does_nothing_and_says_so(problem: dict[str, Any], tmp_path: Path) -> None:
    root = run(problem, base=tmp_path)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    calls = len(asked(tmp_path))
    out = io.StringIO()
    run(problem, base=tmp_path, display=Display(Console(file=out, width=200)))
    assert f"Nothing to do: all 12 steps are done in {root}" in out.getvalue()
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }
    assert len(asked(tmp_path)) == calls


def test_labels_whose_manifest_was_compacted_are_not_asked_for_again(problem: dict[str, Any], tmp_path: Path) -> None:
    root = run(problem, base=tmp_path, until=("label", 0))
    calls = len(asked(tmp_path))
    compact_manifest(root / "labels" / "round=000")
    (root / "labels" / "round=000.summary.json").unlink()
    run(problem, base=tmp_path, until=("label", 0))
    assert len(asked(tmp_path)) == calls


def test_a_row_that_makes_the_teacher_raise_is_a_dead_letter(problem: dict[str, Any], tmp_path: Path) -> None:
    problem["teacher"]["arguments"]["fail_below"] = -1.0
    root = run(problem, base=tmp_path)
    x = make_table(240, 1, labelled=False)["x"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
    for number in range(2):
        labels = labels_of(root / "labels" / f"round={number:03d}")
        files = (root / "deadletter" / f"round={number:03d}").glob("*.parquet")
        dead = [row for f in files for row in pq.read_table(f).to_pylist()]
        assert labels.num_rows + len(dead) == 30
        assert all(x[row["pool_row"], 0] < -1 for row in dead)
        assert all(x[row, 0] >= -1 for row in labels["pool_row"].to_pylist())
        assert all(row["stage"] == "teacher" and "makes the teacher raise" in row["error"] for row in dead)
    metrics = json.loads((root / "report" / "metrics.json").read_text())
    assert sum(r["summary"]["failed"] for r in metrics["rounds"]) > 0, "the problem has such rows"


def test_a_teacher_that_answers_nothing_stops_the_run(problem: dict[str, Any], tmp_path: Path) -> None:
    problem["teacher"]["arguments"]["fail_below"] = 1e9
    with pytest.raises(
        ValueError, match=r"the teacher answered none of the 60 rows asked, 60 of them with: .*ask-validation"
    ):
        run(problem, base=tmp_path)


def test_another_configuration_in_the_same_directory_is_refused(problem: dict[str, Any], tmp_path: Path) -> None:
    run(problem, base=tmp_path, until=("select", 0))
    other = copy.deepcopy(problem)
    other["selection"]["budget"] = 20
    other["training"]["epochs"] = 4
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
        run(other, base=tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'run'} was made by another configuration; it differs in selection.budget (30 there, 20 now). Set these "
        "back, or choose another run.directory: they say what its labels mean or which are bought. More run.rounds, another "
        "[student] and another [training] go on here"
    )


def test_a_changed_pool_is_refused(problem: dict[str, Any], tmp_path: Path) -> None:
    run(problem, base=tmp_path, until=("train", 0))
    pq.write_table(make_table(60, 9, labelled=False), tmp_path / "pool" / "2.parquet")
    with pytest.raises(
        ValueError, match=r"the data changed since .*run was started: pool file\(s\) 2.parquet; put it back"
    ):
        run(problem, base=tmp_path)


def test_a_changed_teacher_is_refused(problem: dict[str, Any], tmp_path: Path) -> None:
    def export(seed: int) -> None:
        torch.manual_seed(seed)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(torch.nn.Linear(4, CLASSES), (torch.zeros(2, 4),), dynamic_shapes=({0: batch},))
        torch.export.save(program, tmp_path / "teacher.pt2")

    problem["teacher"] = {"kind": "torch", "model": "teacher.pt2", "input": {"columns": ["x"]}}
    export(0)
    run(problem, base=tmp_path, until=("train", 0))
    model_cache.forget_models()  # another process would load the file anew
    export(1)
    with pytest.raises(
        ValueError, match=r"the teacher changed: .*run was started with torch:teacher.pt2:\w+, the configuration"
    ):
        run(problem, base=tmp_path)


def test_a_directory_with_other_files_is_left_alone(problem: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError, match=r"run.directory: .*run holds other files \(thesis.tex\); choose an empty or a new"
    ):
        run(problem, base=tmp_path)
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"


def test_two_runs_in_one_directory_at_once(problem: dict[str, Any], tmp_path: Path) -> None:
    from distilbeam.pipelines.config import parse_config
    from distilbeam.pipelines.jobs.opening import opened_run

    with (
        opened_run(parse_config(problem).relative_to(tmp_path)),
        pytest.raises(ValueError, match=rf"is being worked on by process {os.getpid()} on .*; wait for it"),
    ):
        run(problem, base=tmp_path)


def test_no_write_permission(problem: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    problem["run"]["directory"] = "file/run"  # a file stands where a directory must be: refused for root as well
    with pytest.raises(
        ValueError, match=r"run.directory: .*file/run cannot be written \(.*\); choose another with --set"
    ):
        run(problem, base=tmp_path)


def bad(what: str, problem: dict[str, Any], tmp_path: Path) -> str:
    """Break one thing and return the pattern of the sentence that must say so."""
    data = problem["data"]
    match what:
        case "missing pool":
            data["pool"] = "nowhere"
            return r"data.pool must name Parquet files, .*; nothing is at .*nowhere"
        case "missing labelled":
            data["labelled"] = "nowhere.parquet"
            return r"data.labelled must name Parquet files, .*nowhere.parquet"
        case "missing pool column":
            problem["student"]["input"]["columns"] = ["y"]
            return r"data.pool has no column y; its columns are key, x"
        case "missing label column":
            data["label"] = "truth"
            return r"data.labelled has no column truth; its columns are key, x, label"
        case "unknown class":
            data["classes"] = ["0", "1"]
            return r"data.labelled: row [\d,]+ has the class '2' in column label, which is not one of the 2 classes \(0, 1\)"
        case "missing label":
            table = make_table(15, 2, labelled=True)
            labels = table["label"].to_pylist()
            labels[4] = None
            pq.write_table(table.set_column(2, "label", pa.array(labels)), tmp_path / "labelled.parquet")
            return r"data.labelled: row 4 has the class None in column label"
        case "empty pool":
            for file in (tmp_path / "pool").iterdir():
                pq.write_table(pq.read_table(file).slice(0, 0), file)
            return r"data.pool must have at least one row"
        case "budget":
            problem["selection"]["budget"] = 121
            return r"selection.budget times run.rounds must be at most the 240 examples of the pool, got 121 x 2 = 242"
        case "shapes":
            table = make_table(15, 2, labelled=True)
            wider = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(75, np.float32)), 5)
            pq.write_table(table.set_column(1, "x", wider), tmp_path / "labelled.parquet")
            return r"data.labelled: column x is fixed_size_list<.*>\[5\], but fixed_size_list<.*>\[4\] in data.pool"
        case "corrupt pool":
            file = tmp_path / "pool" / "1.parquet"
            file.write_bytes(file.read_bytes()[:-20])
            return r"data.pool: .*1.parquet cannot be read as Parquet \(.*\); write it again or take it out"
        case "corrupt validation":
            (tmp_path / "validation.parquet").write_bytes(b"PAR1")
            return r"data.validation: .*validation.parquet cannot be read as Parquet"
        case "missing teacher":
            problem["teacher"] = {"kind": "torch", "model": "gone.pt2", "input": {"columns": ["x"]}}
            return r"the teacher's file .*gone.pt2 does not exist"
    raise AssertionError(what)


@pytest.mark.parametrize(
    "what",
    [
        "missing pool",
        "missing labelled",
        "missing pool column",
        "missing label column",
        "unknown class",
        "missing label",
        "empty pool",
        "budget",
        "shapes",
        "corrupt pool",
        "corrupt validation",
        "missing teacher",
    ],
)
def test_bad_input_is_a_sentence_before_anything_is_asked(problem: dict[str, Any], tmp_path: Path, what: str) -> None:
    pattern = bad(what, problem, tmp_path)
    with pytest.raises(ValueError, match=f"^{pattern}"):
        run(problem, base=tmp_path)
    assert asked(tmp_path) == []


def test_a_pool_file_damaged_inside_is_named_and_nothing_is_lost(problem: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "pool" / "1.parquet"
    whole = file.read_bytes()
    column = pq.ParquetFile(file).metadata.row_group(1).column(1)
    broken = bytearray(whole)
    start = column.data_page_offset
    broken[start : start + 12] = b"\xff" * 12
    file.write_bytes(broken)
    with pytest.raises(
        PhaseError, match=r"score: 1 item\(s\) could not be done, the first .*1.parquet rows 0-39: .*is damaged"
    ):
        run(problem, base=tmp_path)
    gains = list((tmp_path / "run" / "selected" / "round=000" / "gains").glob("*.parquet"))
    assert len(gains) == 7, "the other units' gains are kept"
    file.write_bytes(whole)
    run(problem, base=tmp_path)


def test_labels_have_the_temperature_that_fits_the_validation_set(problem: dict[str, Any], tmp_path: Path) -> None:
    problem["training"] |= {"objective": "weighted", "reestimate_epochs": 2}
    root = run(problem, base=tmp_path)
    asked_about = read_manifest(root / "teacher" / "validation")
    validation = make_table(60, 3, labelled=True)
    assert asked_about.spec.temperature == 1
    expected = fit_temperature(says(validation, 1), validation["label"].to_numpy()).temperature
    assert not 0.9 < expected < 1.1, "else nothing is shown"
    frozen = json.loads((root / "teacher" / "calibration.json").read_text())
    assert frozen["temperature"] == pytest.approx(expected, rel=0.02)  # stored answers are rounded
    assert frozen["nll_after"] < frozen["nll_before"]
    assert json.loads((root / "report" / "metrics.json").read_text())["temperature"] == frozen["temperature"]
    pool = make_table(240, 1, labelled=False)
    for dataset in (root / "labels" / "round=000", root / "labels" / "round=001", root / "uniform/labels/round=000"):
        spec, labels = read_manifest(dataset).spec, labels_of(dataset)
        assert spec.temperature == frozen["temperature"]
        # those of the uniform choice that were bought before are read, not asked, and mean the same
        np.testing.assert_allclose(
            decode(labels, spec).logprobs, says(pool.take(labels["pool_row"]), spec.temperature), rtol=3e-3, atol=3e-3
        )
    tally = json.loads((root / "uniform/labels/round=000.summary.json").read_text())
    assert tally["reused"] > 0
    # the weights are of the labels as they are learned
    student, x = load_student(root / "students" / "round=000"), validation.select(["x"]).combine_chunks()
    fitted = DebiasEstimator.fit(
        student.logits(x.to_batches()[0]),
        says(validation, frozen["temperature"]),
        validation["label"].to_numpy(),
        soft=True,
    )
    labels = labels_of(root / "labels" / "round=000")
    rows = pool.take(labels["pool_row"])
    logits = student.logits(rows.select(["x"]).combine_chunks().to_batches()[0])
    right, raw = (fitted.weights(logits, says(rows, t)) for t in (frozen["temperature"], 1.0))
    weights = labels["weight"].to_numpy()
    assert np.abs(weights - right).max() < 0.01 < np.abs(weights - raw).max()
    # what validation data come back later does not change what a label means
    (root / "teacher" / "calibration.json").write_text(json.dumps({**frozen, "temperature": 3.0}))
    shutil.rmtree(root / "labels" / "round=001")
    (root / "labels" / "round=001.summary.json").unlink()
    run(problem, base=tmp_path)
    assert read_manifest(root / "labels" / "round=001").spec.temperature == 3.0


def test_a_number_is_the_temperature(problem: dict[str, Any], tmp_path: Path) -> None:
    problem |= {"labels": {"temperature": 1}, "run": problem["run"] | {"rounds": 1}}
    root = run(problem, base=tmp_path)
    labels, spec = labels_of(root / "labels" / "round=000"), read_manifest(root / "labels" / "round=000").spec
    assert spec.temperature == 1
    assert not (root / "teacher" / "calibration.json").exists()
    rows = make_table(240, 1, labelled=False).take(labels["pool_row"])
    np.testing.assert_allclose(decode(labels, spec).logprobs, says(rows, 1), rtol=1e-3, atol=1e-3)
