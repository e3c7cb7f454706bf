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
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.final_training import final_directory, final_sentence, final_student
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


def test_pseudo_labels_are_the_ensembles_at_the_temperature_of_the_validation_set(
    finished: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    of_run, _ = finished
    where = final_directory(of_run)
    pseudo, bought = labels_of(where / "pseudo"), labels_of(of_run.directory.labels(0))
    rows = set(pseudo["pool_row"].to_pylist())
    assert len(rows) == pseudo.num_rows == POOL - BOUGHT
    assert rows.isdisjoint(bought["pool_row"].to_pylist())
    members = [of_run.directory.student(1), *(where / "members" / f"seed={n:03d}" for n in range(1, MEMBERS))]
    assert len({load_student(member).fingerprint() for member in members}) == MEMBERS

    def said(table: pa.Table) -> np.ndarray:
        (batch,) = table.combine_chunks().to_batches()
        return np.log(np.mean([softmax(load_student(m).logits(batch).astype(float), axis=1) for m in members], axis=0))

    validation = pq.read_table(tmp_path / "validation.parquet")
    temperature = fit_temperature(said(validation), validation["label"].to_numpy()).temperature
    spec = read_manifest(where / "pseudo").spec
    assert spec.temperature == pytest.approx(temperature, rel=1e-4)
    assert spec.teacher.startswith(f"pseudo-labels of an ensemble of {MEMBERS} students, ")
    pool = make_table(POOL, 1, labelled=False).take(pseudo["pool_row"])
    assert pseudo["example_id"].to_pylist() == pool["key"].to_pylist()
    expected = log_softmax(said(pool) / temperature, axis=1)
    np.testing.assert_allclose(decode(pseudo, spec).logprobs, expected, atol=2e-3)  # stored in half precision


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
    base = final_directory(of_run) / "candidate" if kept else of_run.directory.student(1)
    assert metrics["epochs"] == load_student(base).extra["metrics"]["best_epoch"]
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


def test_what_is_missing_is_done_again_to_the_same_end(finished: tuple[Run, dict[str, Any]], tmp_path: Path) -> None:
    of_run, data = finished
    where, student = final_directory(of_run), final_student(of_run)
    assert student is not None
    first, shards = (
        load_student(student).fingerprint(),
        sorted(path.name for path in (where / "pseudo").glob("*.parquet")),
    )
    kept = {path.name: path.stat().st_mtime_ns for path in (where / "pseudo").glob("*.parquet")}
    # as a kill in the middle of the phase leaves it
    gone = (where / "pseudo" / shards[0]).stem
    (where / "pseudo" / shards[0]).unlink()
    (where / "pseudo" / "_manifest" / f"{gone}.json").unlink()
    for name in ("gate.json", "final.json", "pseudo.summary.json"):
        (where / name).unlink()
    for name in ("candidate", "student"):
        shutil.rmtree(where / name, ignore_errors=True)
    run(data, base=tmp_path)
    again = final_student(of_run)
    assert again is not None
    assert load_student(again).fingerprint() == first
    now = {path.name: path.stat().st_mtime_ns for path in (where / "pseudo").glob("*.parquet")}
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
    assert 60 - 33 < read_manifest(other / "pseudo").rows < 60 + 33
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
    soft = load_student(final_directory(of_run) / "candidate").extra["metrics"]["soft_rows"]
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


def test_nothing_to_measure_on_is_a_sentence(problem: dict[str, Any]) -> None:
    data = settings(problem, final_training="all")
    del data["data"]["test"]
    with pytest.raises(ValueError, match=r"training.final_training = 'all' needs data.test"):
        parse_config(data)
