"""The studies over a tiny problem: they run, go on where they stopped, and train as the trainer does."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.science import buying, digits, last_training, study1, study2, study3, study4, study7, synthetic
from benchmarks.science.cells import Store
from benchmarks.science.command import Arguments, collect, places
from benchmarks.science.losses import LOSSES, learn
from benchmarks.science.report1 import write_report as report1
from benchmarks.science.report2 import write_report as report2
from benchmarks.science.report_short import write_report as short_report
from benchmarks.science.training import accuracy, fit
from distilbeam.selection.strategies.registry import names
from distilbeam.selection.strategies.selectors import Selector
from distilbeam.student.checkpoint import load_student
from distilbeam.student.training.train import train

STEPS = 12


@pytest.fixture
def given(monkeypatch, tmp_path):
    monkeypatch.setattr(digits, "STEPS", STEPS)
    monkeypatch.setattr(digits, "SIZES", {"lesson": 150, "labelled": 20, "validation": 60, "pool": 300, "test": 200})
    dataset = replace(digits.digits(), teachers={"50 labels": {"labels": 50}})
    return Arguments((dataset,), range(1), Store(tmp_path / "cells"), None, tmp_path / "out", True, ("small",))


@pytest.fixture
def problem(given):
    return given.datasets[0].make({"labels": 50}, 0)


def test_study_1_reports_and_goes_on(given, monkeypatch):
    cells = study1.study_cells(given)
    rows = collect(given, cells)
    assert {row["method"] for row in rows} == set(buying.METHODS)
    assert sorted({row["bought"] for row in rows}) == [6, 15, 30]
    report1(given, rows)
    page = (given.out / "study1.md").read_text()
    assert all(f"| {method} |" in page for method in buying.METHODS)
    assert {path.name for path in given.out.iterdir()} >= {"study1.parquet", "study1-digits-small-calibrated.png"}
    monkeypatch.setattr(study1, "rounds", None)  # computing again would fail
    assert collect(given, study1.study_cells(given)) == rows
    stored = json.loads(next((given.store.directory / "study1").iterdir()).read_text())
    assert stored["key"]["about"]["student"]["kind"] == "mlp"


def test_another_strategy_of_the_registry_is_compared_where_it_is_named(given, problem, monkeypatch):
    named = replace(given, methods=("uniform", "margin", "least-confidence"))
    rows = collect(named, study1.study_cells(named))
    assert {row["method"] for row in rows} == set(named.methods)
    report1(named, rows)
    assert "| least-confidence |" in (given.out / "study1.md").read_text()
    assert set(buying.METHODS) | set(buying.OTHERS) >= set(names())
    strategy = type(
        "Last", (Selector,), {"name": "last", "_select": lambda _, pool, n, __: np.arange(pool.size) >= pool.size - n}
    )
    sys.modules["last_strategy"] = types.ModuleType("last_strategy")
    sys.modules["last_strategy"].Last = strategy
    monkeypatch.setitem(buying.OTHERS, "last", partial(buying._registered, "last_strategy:Last"))
    first = buying.rounds(problem, "last", "small", "hard")[0]
    assert sorted(first["rows"]) == problem.pool[-6:].tolist()


def test_oracle_buys_right_labels_and_all_buy_what_they_were_told(problem):
    figures = {method: buying.rounds(problem, method, "small", "pooled") for method in ("oracle", "rad", "margin")}
    for rounds in figures.values():
        rows = np.concatenate([row["rows"] for row in rounds])
        assert len(np.unique(rows)) == rounds[-1]["bought"] == 30
        assert np.isin(rows, problem.pool).all()
        assert rounds[-1]["teacher_error"] == pytest.approx(1 - problem.right[rows].mean())
    assert figures["oracle"][-1]["teacher_error"] == 0


def test_studies_2_to_4_report(given):
    second = replace(given, parts=("margin",))
    rows = collect(second, study2.study_cells(second))
    assert {row["method"] for row in rows} == set(LOSSES)
    report2(second, rows)
    assert "## By the rule" in (given.out / "study2.md").read_text()
    rows = collect(given, study3.study_cells(given))
    sizes = {row["method"]: row["parameters"] for row in rows}
    assert sizes["plain"] == sizes["none"] < sizes["laurel-rw"] < sizes["laurel-rw+lr"] < sizes["one more layer"]
    fourth = replace(given, parts=("same", "half"))
    rows = collect(fourth, study4.study_cells(fourth))
    human = {row["accuracy"] for row in rows if row["method"] == "human"}
    assert len(human) == 1  # whatever the pool
    short_report(given, rows, "study4", "Blind", study4.METHODS, ("human",), ("pool",))
    assert (given.out / "study4.parquet").exists()


def test_study_7_gives_every_last_training_the_same_labels(given):
    given = replace(given, parts=("whole", "fifth"))
    found = collect(given, study7.study_cells(given))
    rows = {row["method"]: row["accuracy"] for row in found if row["share"] == 0.1}
    assert set(rows) == set(study7.METHODS) - set(study7.ENCODED)  # digits have no words
    assert {row["method"] for row in found if row["share"] == 0.02} == set(study7.COMPARED)
    (last,) = [row for row in found if (row["method"], row["share"]) == ("last", 0.1)]
    assert last["accuracy"] == rows["both" if last["kept"] else "validation"]
    place = next(iter(places(given)))
    problem = place.problem()
    assert rows["teacher"] == problem.teacher_accuracy
    bought = last_training.lesson(problem, 0.1, "", encoder=False).bought
    assert len(set(bought.tolist())) == len(bought) == round(0.1 * len(problem.pool))
    assert set(bought.tolist()) <= set(problem.pool.tolist())
    # the default is what a run's last round gives
    assert rows["default"] == buying.rounds(problem, "herding", "small", "calibrated")[-1]["accuracy"]


def test_whoever_is_judged_on_a_fold_knows_nothing_of_it(problem):
    taught = last_training.Lesson(problem, problem.pool[:30])
    assert sorted(np.concatenate(taught.parts).tolist()) == list(range(60))
    other = replace(problem, truth=problem.truth.copy())
    rows = problem.validation[taught.parts[2]]
    other.truth[rows] = (other.truth[rows] + 1) % 10  # nobody who is judged on fold 2 may notice
    other.__dict__["calibration"] = problem.calibration  # of the teacher, which learns from every validation row
    again = last_training.Lesson(other, taught.bought)
    np.testing.assert_array_equal(taught.said[2], again.said[2])
    assert not np.array_equal(taught.said[1], again.said[1])


def test_study_2_shares_the_teachers_labels_and_the_whole_pool(given, problem):
    papers = replace(given, parts=("everything",), methods=("nothing", "hard", "pooled"))
    rows = {row["method"]: row for row in collect(papers, study2.study_cells(papers))}
    assert rows.keys() == {"nothing", "hard", "pooled"}
    assert all(row["bought"] == len(problem.pool) for row in rows.values())
    regime = study2.shared(problem)
    assert len(regime.labelled) == 50  # what this teacher has seen
    assert not set(regime.labelled) & {*problem.pool, *problem.validation, *problem.test}
    student = fit(regime, None, regime.human(regime.labelled))
    assert rows["nothing"]["accuracy"] == accuracy(student, regime)
    report2(papers, [*rows.values()])
    assert "everything" in (given.out / "study2.md").read_text()


def test_study_2_compares_by_what_a_wrong_label_names(given):
    about = {"dataset": "synthetic", "buyer": "rad", "teacher_accuracy": 0.7, "teacher_error": 0.3}
    about |= dict.fromkeys(("temperature", "teacher_ece", "teacher_ece_calibrated"), 1.0)
    gain = {"runner-up": -0.02, "random": 0.01, "next": 0.03}
    rows = [
        about
        | {
            "teacher": name,
            "seed": seed,
            "method": method,
            "accuracy": 0.5 + gain[dials["shape"]] * (method == "pooled"),
        }
        for name, dials in synthetic.synthetic().teachers.items()
        for seed in range(3)
        for method in ("calibrated", "pooled")
    ]
    report2(given, rows)
    page = (given.out / "study2.md").read_text().partition("# The synthetic family by what a wrong label names")[2]
    assert "| minus calibrated | random | runner-up | next |" in page
    assert "| pooled | **+1.0 ± 0.0** | **-2.0 ± 0.0** | **+3.0 ± 0.0** |" in page


def test_trained_in_memory_as_by_the_trainer(problem, tmp_path):
    table = pa.table({"pixels": list(problem.inputs[problem.pool].numpy()), "label": problem.truth[problem.pool]})
    epochs = round(STEPS / np.ceil(len(problem.pool) / problem.training.batch_size))
    result = train(
        problem.student,
        problem.training.model_copy(update={"epochs": epochs}),
        classes=[str(digit) for digit in range(10)],
        labelled=table,
        label_column="label",
        soft_labels=[],
        validation=None,
        directory=tmp_path / "student",
        seed=problem.seed,
    )
    here = fit(problem, None, problem.human(problem.pool)).state_dict()
    there = load_student(result.directory).module.state_dict()
    assert all(torch.equal(here[name], there[name]) for name in there)


def test_partial_labels_have_the_gradient_of_their_loss(problem):
    bought = problem.pool[:40]
    soft = LOSSES["partial"](problem, bought).soft
    student = fit(problem, None, problem.human(problem.labelled))
    logits = student(soft.columns["inputs"]).detach().requires_grad_()
    batch = soft.prepare(student, soft.columns)
    top = soft.columns["teacher_logprobs"].topk(2).indices
    (-logits.log_softmax(1).gather(1, top).logsumexp(1).sum()).backward()
    expected = logits.softmax(1).detach() - batch["teacher_logprobs"].exp()  # of the cross-entropy to these labels
    torch.testing.assert_close(logits.grad, expected)


def test_a_perfect_teacher_needs_no_mercy(problem):
    perfect = np.full(problem.teacher_logits.shape, -20.0, np.float32)
    perfect[np.arange(len(perfect)), problem.truth] = 20.0
    sure = replace(problem, teacher_logits=perfect)
    students = [learn(sure, problem.pool, name) for name in ("truth", "hard")]
    a, b = (student.state_dict() for student in students)
    # the same labels as rows of the other kind: dealt out in another order, hence near, not equal
    right = [
        (s(problem.inputs[problem.test]).argmax(1).numpy() == problem.truth[problem.test]).mean() for s in students
    ]
    assert abs(right[0] - right[1]) < 0.15
    assert a.keys() == b.keys()


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_synthetic_dials(correlation):
    dials = {"error": 0.3, "correlation": correlation, "shape": "runner-up", "informative": True}
    made = synthetic.make(dials, 1)
    # 6,000 rows: five standard errors of a rate of .3
    assert abs((~made.right).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / len(made.truth))
    scores = np.random.default_rng(0).standard_normal((1_000, 4))
    rates = synthetic.error_rates(scores, 0.3, correlation)
    assert rates.mean() == pytest.approx(0.3)
    assert rates.max() - rates.min() == pytest.approx(correlation)
