"""What a report adds about a run: the baseline on the same labels, and the model cards of its students."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from problem import add_texts, labels_of, write_problem
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from distilbeam.pipelines import run
from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import parse_config
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.report import baseline
from distilbeam.pipelines.report.html import calls_sentences, results_table, table_rows
from distilbeam.teacher.softlabels import read_manifest


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended."""
    where = tmp_path_factory.mktemp("baseline")
    run(write_problem(where), base=where)
    return where


def figures_of(where: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((where / "run" / "report" / "metrics.json").read_text())
    return found


def numbers(table: pa.Table) -> np.ndarray:
    return np.array(table["x"].to_pylist(), np.float64)


def test_the_baseline_is_fitted_on_the_labels_of_the_last_student(finished: Path) -> None:
    results = figures_of(finished)
    row = results["baseline"]
    human, test = (pq.read_table(finished / f"{name}.parquet") for name in ("labelled", "test"))
    bought = [labels_of(finished / "run" / "labels" / f"round={n:03d}") for n in range(2)]
    x = np.concatenate([numbers(table) for table in (human, *bought)])
    said = [np.array(table["teacher_logprobs"].to_pylist()).argmax(axis=1) for table in bought]
    y = np.concatenate([human["label"].to_numpy(), *said])
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(max_iter=200).fit(scaler.transform(x), y)
    right = model.predict(scaler.transform(numbers(test))) == test["label"].to_numpy()
    assert row["accuracy"] == pytest.approx(right.mean(), abs=1 / 80 + 1e-9)
    chosen = model.predict_proba(scaler.transform(numbers(test)))[np.arange(80), test["label"].to_numpy()]
    assert row["nll"] == pytest.approx(-np.log(chosen).mean(), abs=0.02)
    assert row["labels"] == 60
    assert row["parameters"] == 3 * 4 + 3
    assert table_rows(results)[-1][:2] == ("logistic regression", "60")
    page = (finished / "run" / "report" / "report.html").read_text()
    assert "logistic regression" in page


def test_a_student_that_is_not_worth_its_trouble_is_said(finished: Path) -> None:
    results = figures_of(finished)
    for accuracy, said in ((0.99, True), (0.01, False)):
        results["baseline"]["accuracy"] = accuracy
        found = [sentence for sentence in calls_sentences(results) if "not worth its trouble" in sentence]
        assert bool(found) == said
    results["baseline"] = {"name": "logistic regression", "why": "the labels are of a single class"}
    assert "There is no baseline (logistic regression): the labels are of a single class." in calls_sentences(results)
    assert len(results_table(results).rows) == len(table_rows(results)) == len(table_rows(figures_of(finished))) - 1


def test_of_many_labels_a_part_is_learned_and_the_row_says_so(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "ROWS", 50)
    of_run = opened(finished)
    row = baseline.baseline_row(of_run, "test")
    assert row["name"] == "logistic regression, 50 rows"
    monkeypatch.setattr(baseline, "ROWS", 10_000)
    monkeypatch.setattr(baseline, "NUMBERS", 4 * 33)
    assert baseline.baseline_row(of_run, "test")["name"] == "logistic regression, 33 rows"


def opened(where: Path) -> Run:
    data = {name: str(where / f"{name}.parquet") for name in ("labelled", "validation", "test")}
    teacher = {
        "kind": "torch",
        "model": "logging_teacher:LoggingTeacher",
        "arguments": {"log": str(where / "asked.log")},
        "input": {"columns": ["x"]},
    }
    settings = {
        "run": {"rounds": 2, "directory": str(where / "run")},
        "data": {"pool": str(where / "pool"), **data, "id": "key"},
        "teacher": teacher,
        "selection": {"method": "rad", "budget": 30},
        "student": {"kind": "mlp", "hidden": [8], "input": {"columns": ["x"]}},
    }
    return Run(parse_config(settings), RunDirectory(where / "run"))


def test_texts_are_learned_by_tfidf(tmp_path: Path) -> None:
    settings = add_texts(tmp_path, write_problem(tmp_path))
    run(settings, base=tmp_path)
    row = figures_of(tmp_path)["baseline"]
    human, test = (pq.read_table(tmp_path / f"{name}.parquet") for name in ("labelled", "test"))
    bought = [labels_of(tmp_path / "run" / "labels" / f"round={n:03d}") for n in range(2)]
    texts = [text for table in (human, *bought) for text in table["text"].to_pylist()]
    said = [np.array(table["teacher_logprobs"].to_pylist()).argmax(axis=1) for table in bought]
    terms = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10, max_iter=200).fit(
        terms.fit_transform(texts), np.concatenate([human["label"].to_numpy(), *said])
    )
    right = model.predict(terms.transform(test["text"].to_pylist())) == test["label"].to_numpy()
    assert row["name"] == "TF-IDF, logistic regression"
    assert row["accuracy"] == pytest.approx(right.mean(), abs=1 / 80 + 1e-9)
    card = (tmp_path / "run" / "students" / "round=002" / "README.md").read_text()
    assert "It reads the column(s) `text` (text input)" in card


def test_students_have_cards_with_the_runs_figures(finished: Path) -> None:
    results, students = figures_of(finished), finished / "run" / "students"
    teacher = read_manifest(finished / "run" / "labels" / "round=000").spec.teacher
    for number, row in enumerate(results["students"]):
        card = (students / f"round={number:03d}" / "README.md").read_text()
        assert f"| test | 80 | {row['accuracy']:.1%} | {row['nll']:.3f} |" in card
        assert f"| labels bought | {row['labels']}, chosen by rad |" in card
        assert "a pool of 240 unlabelled rows, 15 labelled ones to begin with" in card
        assert f"| teacher | {teacher}, wrong on {results['wrong_share']:.1%} of the validation set |" in card
        assert ("By class on the test set" in card) == (number == results["kept"]["round"])
    kept = (students / f"round={results['kept']['round']:03d}" / "README.md").read_text()
    for entry in results["classes"]:
        assert f"| {entry['class']} | {entry['examples']} | {entry['recall']:.1%} |" in kept


def test_an_export_has_the_figures_of_its_evaluation(finished: Path, tmp_path: Path) -> None:
    student, out = finished / "run" / "students" / "round=002", tmp_path / "exports"
    words = ["export", str(student), "--format", "pt2", "--output", str(out), "--data", str(finished / "test.parquet")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    card = (out / "pt2" / "README.md").read_text()
    (_, row) = json.loads((out / "results.json").read_text())["rows"]
    assert f"| data | 80 | {row['data']['accuracy']:.1%} |" in card
    assert "By class on the data set, the lowest recall first:" in card
    assert "`model.pt2` takes `input`, float32 [batch, 4]" in card
