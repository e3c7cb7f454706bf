"""The last training: pseudo-labels of an ensemble, the validation rows, and what is said of them."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
from problem import asked, labels_of, make_table
from scipy.special import log_softmax, softmax
from typer.testing import CliRunner

from distilbeam.pipelines import run
from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import parse_config
from distilbeam.pipelines.jobs.cross_fitting import CrossFittedTraining
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.final_result import final_directory, final_sentence, final_student
from distilbeam.pipelines.jobs.run import Run
from distilbeam.selection.trust.calibration import fit_temperature
from distilbeam.student.checkpoint import load_student
from distilbeam.teacher.softlabels import decode, read_manifest

POOL, BOUGHT, MEMBERS = 240, 30, 3


def settings(problem: dict[str, Any], **training: Any) -> dict[str, Any]:
    data = copy.deepcopy(problem)
    data["run"]["rounds"] = 1
    data["selection"]["compare_uniform"] = False
    data["training"] = {"epochs": 4, "lr": 0.03, "ensemble": MEMBERS, **training}
    return data


def run_of(data: dict[str, Any], root: Path) -> Run:
    return Run(parse_config(data).relative_to(root.parent), RunDirectory(root))


@pytest.fixture
def finished(problem: dict[str, Any], tmp_path: Path) -> tuple[Run, dict[str, Any]]:
    data = settings(problem)
    return run_of(data, run(data, base=tmp_path)), data


def probabilities(student: Path, table: pa.Table, temperature: float = 1.0) -> np.ndarray:
    (batch,) = table.combine_chunks().to_batches()
    return softmax(load_student(student).logits(batch).astype(float) / temperature, axis=1)


def test_students_that_know_no_validation_row_label_at_the_temperature_that_suits_it(
    problem: dict[str, Any], tmp_path: Path
) -> None:
    data = settings(problem, final_training="apart")
    of_run = run_of(data, run(data, base=tmp_path))
    where = final_directory(of_run)
    pseudo, bought = labels_of(where / "pseudo"), labels_of(of_run.directory.labels(0))
    rows = set(pseudo["pool_row"].to_pylist())
    assert len(rows) == pseudo.num_rows == POOL - BOUGHT
    assert rows.isdisjoint(bought["pool_row"].to_pylist())
    members = [of_run.directory.student(1), *(where / "members" / f"seed={n:03d}" for n in range(1, MEMBERS))]
    assert len({load_student(member).fingerprint() for member in members}) == MEMBERS

    def said(table: pa.Table) -> np.ndarray:
        return np.log(np.mean([probabilities(m, table) for m in members], axis=0))

    validation = pq.read_table(tmp_path / "validation.parquet")
    temperature = fit_temperature(said(validation), validation["label"].to_numpy()).temperature
    spec = read_manifest(where / "pseudo").spec
    assert spec.temperature == pytest.approx(temperature, rel=1e-4)
    assert spec.teacher.startswith(f"pseudo-labels of an ensemble of {MEMBERS} students, ")
    pool = make_table(POOL, 1, labelled=False).take(pseudo["pool_row"])
    assert pseudo["example_id"].to_pylist() == pool["key"].to_pylist()
    expected = log_softmax(said(pool) / temperature, axis=1)
    np.testing.assert_allclose(decode(pseudo, spec).logprobs, expected, atol=2e-3)  # stored in half precision


def test_every_member_learns_the_validation_rows_but_its_fold_and_labels_the_pool_with_the_others(
    finished: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    of_run, _ = finished
    training = CrossFittedTraining(of_run)
    validation = pq.read_table(tmp_path / "validation.parquet")
    truth, parts = validation["label"].to_numpy(), training.parts_of_validation
    assert sorted(np.concatenate(parts).tolist()) == list(range(60))
    assert len(parts) == MEMBERS
    unseen = np.zeros((60, 3))
    for number, fold in enumerate(parts):
        metrics = load_student(training.member(number)).extra["metrics"]
        assert metrics["hard_rows"] == 15 + 60 - len(fold)
        assert metrics["soft_rows"] == BOUGHT
        # its epoch was chosen on the fold: the figures are those of these rows
        right = probabilities(training.member(number), validation.take(fold)).argmax(axis=1) == truth[fold]
        assert metrics["validation_accuracy"] == pytest.approx(right.mean())
        unseen[fold] = np.log(probabilities(training.member(number), validation.take(fold)))
    temperature = fit_temperature(unseen, truth).temperature
    assert training.temperature == pytest.approx(temperature, rel=1e-4)
    pool = make_table(POOL, 1, labelled=False)
    tempered = [probabilities(training.member(number), pool, temperature) for number in range(MEMBERS)]
    datasets = {training.tried(n).with_name("pseudo"): tempered[n] for n in range(MEMBERS)}
    if json.loads(training.gate.read_text())["kept"]:
        datasets[training.pseudo] = np.mean(tempered, axis=0)
    for dataset, expected in datasets.items():
        pseudo = labels_of(dataset)
        assert pseudo.num_rows == POOL - BOUGHT
        rows = pseudo["pool_row"].to_numpy()
        said = decode(pseudo, read_manifest(dataset).spec).logprobs
        np.testing.assert_allclose(said, np.log(expected[rows]), atol=2e-3)  # stored in half precision


def test_the_gate_judges_every_validation_row_by_students_that_have_not_learned_it(
    finished: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    of_run, _ = finished
    training = CrossFittedTraining(of_run)
    validation, gate = pq.read_table(tmp_path / "validation.parquet"), json.loads(training.gate.read_text())
    truth = validation["label"].to_numpy()
    for name, student in (("before", training.member), ("after", training.tried)):
        found = [
            probabilities(student(n), validation.take(f))[np.arange(len(f)), truth[f]]
            for n, f in enumerate(training.parts_of_validation)
        ]
        hits = [
            probabilities(student(n), validation.take(f)).argmax(1) == truth[f]
            for n, f in enumerate(training.parts_of_validation)
        ]
        assert gate[name]["accuracy"] == pytest.approx(np.concatenate(hits).mean())
        assert gate[name]["nll"] == pytest.approx(-np.log(np.concatenate(found)).mean(), rel=1e-4)
    assert gate["won"] - gate["lost"] == round(60 * (gate["after"]["accuracy"] - gate["before"]["accuracy"]))
    for number, fold in enumerate(training.parts_of_validation):
        metrics = load_student(training.tried(number)).extra["metrics"]
        assert (metrics["hard_rows"], metrics["soft_rows"]) == (15 + 60 - len(fold), POOL)


def test_without_a_test_set_figures_are_those_of_the_folds(problem: dict[str, Any], tmp_path: Path) -> None:
    data = settings(problem, final_training="all", self_training=False)
    del data["data"]["test"]
    of_run = run_of(data, run(data, base=tmp_path))
    training = CrossFittedTraining(of_run)
    assert not (training.where / "tried").exists()
    student = final_student(of_run)
    assert student is not None
    metrics = load_student(student).extra["metrics"]
    losses = np.zeros(4)
    for number, fold in enumerate(training.parts_of_validation):
        lines = map(json.loads, (training.member(number) / "metrics.jsonl").read_text().splitlines())
        losses += len(fold) * np.array([line["validation_nll"] for line in lines])
    assert metrics["hard_rows"] == 15 + 60
    assert metrics["epochs"] == losses.argmin() + 1
    results = json.loads(of_run.directory.metrics.read_text())
    row, truth = results["final"]["row"], of_run.truth("validation")
    unseen = training.unseen_logits(with_pseudo=False).argmax(axis=1) == truth
    assert row["name"] == "student, final, by folds"
    assert row["accuracy"] == pytest.approx(unseen.mean())
    assert results["final"]["cross_validated"]["accuracy"] == pytest.approx(unseen.mean())
    html = (of_run.directory.report / "report.html").read_text()
    assert f"students of its kind that have not learned them have {unseen.mean():.1%} of them right" in html
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(data))
    done = CliRunner().invoke(app, ["export", str(config), "--format", "pt2"])
    assert done.exit_code == 0, done.output
    table = json.loads((of_run.directory.root / "exports" / final_directory(of_run).name / "results.json").read_text())
    assert not any("validation" in row for row in table["rows"]), "it has learned these rows"


def test_the_final_student_learns_everything_and_asks_nobody(
    finished: tuple[Run, dict[str, Any]], problem: dict[str, Any], tmp_path: Path
) -> None:
    of_run, _ = finished
    found = json.loads((final_directory(of_run) / "final.json").read_text())
    assert found["validation_rows"]
    student = final_student(of_run)
    assert student is not None
    metrics = load_student(student).extra["metrics"]
    kept = found["pseudo_labels"]
    assert metrics["hard_rows"] == 15 + 60
    assert metrics["soft_rows"] == BOUGHT + kept * (POOL - BOUGHT)
    assert not any(name.startswith("validation") for name in metrics), "nothing is left to be measured on"
    plain = copy.deepcopy(problem) | {"run": {"rounds": 1, "seed": 0, "directory": "plain"}}
    plain["selection"]["compare_uniform"] = False
    paid = sorted(asked(tmp_path))
    (tmp_path / "asked.log").unlink()
    run(plain, base=tmp_path)
    assert len(paid) == len(asked(tmp_path)), "a last training costs no call"
    results = json.loads(of_run.directory.metrics.read_text())
    assert results["final"]["row"]["name"] == "student, final"
    html = (of_run.directory.report / "report.html").read_text()
    assert final_sentence(found) in html
    assert "on which it can no longer be measured" in html


def test_pseudo_labels_that_do_not_help_are_left_out_and_said(
    problem: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Run.student_logits

    def logits(self: Run, student: Path, name: str) -> np.ndarray:
        found = real(self, student, name)
        return -found if (student.name, name) == ("candidate", "validation") else found

    monkeypatch.setattr(Run, "student_logits", logits)
    data = settings(problem, final_training="apart")
    of_run = run_of(data, run(data, base=tmp_path))
    found = json.loads((final_directory(of_run) / "final.json").read_text())
    assert (found["student"], found["pseudo_labels"]) == (None, False)
    assert final_student(of_run) is None
    assert "do not help and are left out" in (of_run.directory.report / "report.html").read_text()


@pytest.mark.parametrize("worse", [True, False])
def test_pseudo_labels_are_learned_where_students_are_better_with_them_on_the_folds(
    problem: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worse: bool
) -> None:
    real = Run.student_logits

    def logits(self: Run, student: Path, name: str) -> np.ndarray:
        found = real(self, student, name)
        turned = "tried" if worse else "members"  # whoever is to be worse names the class that it thinks least likely
        return -found if name == "validation" and turned in (student.parent.name, student.parent.parent.name) else found

    monkeypatch.setattr(Run, "student_logits", logits)
    data = settings(problem)
    of_run = run_of(data, run(data, base=tmp_path))
    gate = json.loads(CrossFittedTraining(of_run).gate.read_text())
    assert gate["kept"] is not worse
    assert (gate["lost"] > gate["won"]) is worse
    student = final_student(of_run)
    assert student is not None
    metrics = load_student(student).extra["metrics"]
    assert (metrics["hard_rows"], metrics["soft_rows"]) == (15 + 60, BOUGHT if worse else POOL)
    said = "do not help and are left out" if worse else "help and are learned"
    assert said in (of_run.directory.report / "report.html").read_text()


def test_what_is_missing_is_done_again_to_the_same_end(finished: tuple[Run, dict[str, Any]], tmp_path: Path) -> None:
    of_run, data = finished
    where, student = final_directory(of_run), final_student(of_run)
    assert student is not None
    pseudo = where / "tried" / "seed=001" / "pseudo"
    first, shards = load_student(student).fingerprint(), sorted(path.name for path in pseudo.glob("*.parquet"))
    kept = {path.name: path.stat().st_mtime_ns for path in (pseudo).glob("*.parquet")}
    # as a kill in the middle of the phase leaves it
    gone = (pseudo / shards[0]).stem
    (pseudo / shards[0]).unlink()
    (pseudo / "_manifest" / f"{gone}.json").unlink()
    for name in ("gate.json", "final.json", "tried/seed=001/tried.json"):
        (where / name).unlink()
    for name in ("tried/seed=001/student", "student"):
        shutil.rmtree(where / name)
    run(data, base=tmp_path)
    again = final_student(of_run)
    assert again is not None
    assert load_student(again).fingerprint() == first
    now = {path.name: path.stat().st_mtime_ns for path in pseudo.glob("*.parquet")}
    assert {name for name in now if now[name] != kept[name]} == {shards[0]}


def test_of_a_large_pool_some_rows_are_drawn_and_other_settings_have_a_folder_of_their_own(
    finished: tuple[Run, dict[str, Any]], problem: dict[str, Any], tmp_path: Path
) -> None:
    of_run, _ = finished
    fewer = settings(problem, pseudo_rows=60)
    root = run(fewer, base=tmp_path)
    assert root == of_run.directory.root
    assert not (root / "variants").exists(), "the students of the rounds are the same"
    other = final_directory(run_of(fewer, root))
    assert other != final_directory(of_run)
    # 210 rows, each drawn with 60/210: a standard deviation of 6.5, five of which are allowed
    assert 60 - 33 < read_manifest(other / "tried" / "seed=000" / "pseudo").rows < 60 + 33
    results = json.loads(of_run.directory.metrics.read_text())
    assert results["final"]["directory"] == str(other.relative_to(root)), "figures are those of the settings"


@pytest.mark.parametrize(
    "sections",
    [
        {"labels": {"kind": "top_k", "k": 2}},
        {"labels": {"kind": "sampled", "k": 8}},
        {"training": {"objective": "slam+weighted"}},
        {"labels": {"pooled": True}},
    ],
)
def test_pseudo_labels_stand_beside_labels_of_every_form(
    problem: dict[str, Any], tmp_path: Path, sections: dict[str, dict[str, Any]]
) -> None:
    data = settings(problem, ensemble=2, epochs=2)
    for name, values in sections.items():
        data.setdefault(name, {}).update(values)
    of_run = run_of(data, run(data, base=tmp_path))
    gate = json.loads((final_directory(of_run) / "gate.json").read_text())
    assert gate["ensemble"]["rows"] == POOL - BOUGHT
    soft = load_student(CrossFittedTraining(of_run).tried(1)).extra["metrics"]["soft_rows"]
    assert soft == POOL


def test_the_final_student_is_exported_without_figures_on_what_it_learned(
    finished: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    of_run, data = finished
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(data))
    done = CliRunner().invoke(app, ["export", str(config), "--format", "pt2"])
    assert done.exit_code == 0, done.output
    table = json.loads((of_run.directory.root / "exports" / final_directory(of_run).name / "results.json").read_text())
    assert table["student"] == str(final_student(of_run))
    assert all("test" in row and "validation" not in row for row in table["rows"])
