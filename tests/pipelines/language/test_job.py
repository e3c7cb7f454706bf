"""A run of a language model from end to end: what is chosen, asked, learned and measured, and what a second call does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from language_models import write_tokenizer
from language_runs import LENGTH, asked, log_what_is_asked, settings_of, write_blocks, write_run
from typer.testing import CliRunner

from distilbeam.inputs.blocks import has_label
from distilbeam.pipelines.acquisition.score_blocks import arrays_of
from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.engine.model_cache import forget_models
from distilbeam.pipelines.language.report import sentences
from distilbeam.pipelines.steps import run
from distilbeam.selection.rounding import shard_rng
from distilbeam.selection.strategies.herding import herd
from distilbeam.student.language.evaluate import evaluate_language_model
from distilbeam.student.language.folder import load_language_model
from distilbeam.student.language.scoring import BlockScores, score_blocks
from distilbeam.teacher.softlabels import read_manifest
from distilbeam.teacher.tokens.causal_lm import CausalLMTeacher

pytest.importorskip("transformers", reason="needs distilbeam[hf]")
ROUNDS, BUDGET, POOL = 2, 12, 60


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was carried out by the command line, with a log of what was asked."""
    place = tmp_path_factory.mktemp("finished")
    config = write_run(place)
    labels = CausalLMTeacher.token_labels
    log_what_is_asked(place / "asked.log")
    forget_models()
    try:
        done = CliRunner().invoke(app, ["run", str(config)], catch_exceptions=False)
    finally:
        CausalLMTeacher.token_labels = labels
    assert done.exit_code == 0, done.output
    (place / "output.txt").write_text(done.output)
    return place


def pool_of(place: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(place / "pool" / name) for name in ("a.parquet", "b.parquet")])


def bought(root: Path, name: str = "labels/round=000") -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in read_manifest(root / name).paths()])


def scored(student: Path, blocks: pa.Table) -> BlockScores:
    network = load_language_model(student).network
    return score_blocks(network, arrays_of(blocks), "entropy", 300, next(network.parameters()).device)


def figures(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "run" / "report" / "metrics.json").read_text())
    return found


def test_the_first_round_is_chance_and_the_next_what_the_selector_chooses(finished: Path) -> None:
    root, pool = finished / "run", pool_of(finished)
    plans = [json.loads((root / f"selected/round={r:03d}/plan.json").read_text()) for r in range(ROUNDS)]
    assert [plan["method"] for plan in plans] == ["uniform", "herding"]
    first = bought(root)["pool_row"].to_numpy()
    left = np.setdiff1d(np.arange(POOL), first)
    student = root / "students" / "round=001"
    said, known = scored(student, pool.take(left)), scored(student, pool.take(first))
    wanted = left[herd(said.embeddings, said.gains, known.embeddings, BUDGET, shard_rng(0, 1, "herding"))]
    assert bought(root, "labels/round=001")["pool_row"].to_pylist() == sorted(wanted.tolist())


def test_what_herding_chooses_covers_more_than_chance(finished: Path) -> None:
    root, pool = finished / "run", pool_of(finished)
    first, second = (bought(root, f"labels/round={r:03d}")["pool_row"].to_numpy() for r in range(ROUNDS))
    left = np.setdiff1d(np.arange(POOL), first)
    student = root / "students" / "round=001"
    said, known = scored(student, pool.take(left)), scored(student, pool.take(first))
    points, labelled = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (said.embeddings, known.embeddings))
    to_known = ((points[:, None] - labelled[None]) ** 2).sum(2).min(1)
    apart = ((points[:, None] - points[None]) ** 2).sum(2)
    near = np.exp(-np.c_[to_known[:, None], apart] / np.median(to_known))

    def covered(rows: np.ndarray[Any, Any]) -> float:
        chosen = [0, *(1 + np.flatnonzero(np.isin(left, rows)))]
        return float((said.gains * near[:, chosen].max(1)).sum())

    rng = np.random.default_rng(0)
    by_chance = [covered(rng.choice(left, BUDGET, replace=False)) for _ in range(200)]
    assert covered(second) > max(by_chance)


def test_nothing_is_asked_twice_and_everything_is_learned(finished: Path) -> None:
    root = finished / "run"
    ids = {name: set(bought(root, name)["example_id"].to_pylist()) for name in ("labels/round=000", "labels/round=001")}
    assert not ids["labels/round=000"] & ids["labels/round=001"]
    uniform = set(bought(root, "uniform/labels/round=000")["example_id"].to_pylist())
    held_out = set(bought(root, "teacher/validation")["example_id"].to_pylist())
    every = ids["labels/round=000"] | ids["labels/round=001"] | uniform | held_out
    assert asked(finished / "asked.log") == dict.fromkeys(every, 1)
    found = figures(finished)
    assert found["asked"]["uniform"] == len(uniform - ids["labels/round=000"] - ids["labels/round=001"])
    again = CliRunner().invoke(app, ["run", str(finished / "run.toml")], catch_exceptions=False)
    assert "Nothing to do: all 12 steps are done" in again.output
    # an answer that is copied is the one that was bought
    one, copied = bought(root), bought(root, "uniform/labels/round=000")
    shared = sorted(set(one["example_id"].to_pylist()) & uniform)
    assert shared
    same = [
        t.filter(pa.compute.is_in(t["example_id"], pa.array(shared)))
        .sort_by("example_id")
        .drop_columns(["inclusion_probability"])
        for t in (one, copied)
    ]
    assert same[0].equals(same[1])


def test_the_figures_are_those_of_evaluate(finished: Path) -> None:
    root, found = finished / "run", figures(finished)
    rows = {
        root / "students/round=000": found["students"][0],
        root / "students/round=002": found["students"][2],
        root / "plain/students/round=002": found["plain"],
        root / "uniform/students/round=001": found["uniform"],
    }
    for student, row in rows.items():
        measured = evaluate_language_model(student, root / "teacher" / "validation")
        for name in ("bits_per_byte", "kl", "agreement", "teacher_bits_per_byte"):
            assert row[name] == pytest.approx(measured[name], rel=1e-5), name
        assert row["given"] + row["continued"] == measured["continued"]
    assert found["teacher"]["bits_per_byte"] == found["students"][0]["teacher_bits_per_byte"]
    learned = bought(root)
    segments, mask = (np.array(learned[name].to_pylist()) for name in ("segment_ids", "completion_mask"))
    assert found["rounds"][0]["labels"] == has_label(segments, mask).sum() == found["students"][1]["labels"]
    sizes = [
        sum(Path(p).stat().st_size for p in read_manifest(root / f"labels/round={r:03d}").paths())
        for r in range(ROUNDS)
    ]
    assert found["labels"]["bytes"] == sum(sizes)


def test_the_plain_student_has_read_no_label(finished: Path) -> None:
    root = finished / "run"
    told = json.loads((root / "plain/students/round=002/student.json").read_text())["extra"]["training"]
    assert told["hard_share"] == 1.0
    plain, taught = ((root / name / "students/round=002/model.safetensors").read_bytes() for name in ("plain", "."))
    assert plain != taught


def test_the_report_says_it_to_people(finished: Path) -> None:
    html = (finished / "run/report/report.html").read_text()
    text = (finished / "run/report/report.md").read_text()
    output = (finished / "output.txt").read_text()
    found = figures(finished)
    last = f"{found['students'][-1]['bits_per_byte']:.3f}"
    for said in (html, text, output):
        assert last in said
        assert "student, uniform choice" in said
        assert "bytes a token with its text" in said
    assert html.count("data:image/png;base64,") == 2
    assert "<script" not in html
    assert repr(found["teacher"]["continued"]).strip("'\"")[:3] in text
    assert f"| 2 | herding | {POOL - BUDGET} | {BUDGET} | 0 |" in text


def test_the_gains_of_pool_and_choice_fill_the_plot(finished: Path) -> None:
    entry = figures(finished)["rounds"][1]
    counted = [np.array(entry[name]) for name in ("pool", "bought")]
    assert [int(counts.sum()) for counts in counted] == [POOL - BUDGET, BUDGET]
    assert counted[0][0] + counted[1][0] > 0 < counted[0][-1] + counted[1][-1]


def test_the_report_says_that_a_teacher_is_no_better_than_its_text(finished: Path) -> None:
    found = figures(finished)
    plain = found["plain"]["bits_per_byte"]
    for teacher, is_said in ((plain + 0.5, True), (plain - 0.5, False)):
        said = sentences({**found, "teacher": {**found["teacher"], "bits_per_byte": teacher}})
        beside = f"no better than the student of the text alone ({teacher:.3f} and {plain:.3f} bits per byte)"
        assert any(beside in sentence for sentence in said) == is_said


def test_another_student_is_refused_with_a_way_out(finished: Path) -> None:
    config = str(finished / "run.toml")
    done = CliRunner().invoke(app, ["run", config, "--set", "training.lr=0.5"])
    said = str(done.exception)
    assert "has a language model of other settings; it differs in training.lr (0.01 there, 0.5 now)" in said
    assert "'distilbeam launch'" in said
    done = CliRunner().invoke(app, ["run", config, "--set", "selection.budget=3"])
    assert "differs in selection.budget (12 there, 3 now)" in str(done.exception)
    for command in ("tune", "pareto", "export"):
        done = CliRunner().invoke(app, [command, config])
        assert "describes a run of a language model, and this is for classifiers" in str(done.exception)


def test_more_rounds_go_on_and_ask_for_what_is_new_alone(finished: Path) -> None:
    root = finished / "run"
    before = {path: path.read_bytes() for path in (root / "labels").rglob("*.parquet")}
    done = CliRunner().invoke(
        app, ["select", str(finished / "run.toml"), "--set", "run.rounds=3", "--round", "2"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert json.loads((root / "selected/round=002/plan.json").read_text())["examples"] == POOL - 2 * BUDGET
    assert all(path.read_bytes() == content for path, content in before.items())


def sentence(place: Path, **sections: Any) -> str:
    with pytest.raises((ValueError, RuntimeError)) as e:
        run(settings_of(place, **sections), base=place)
    return str(e.value)


def test_what_cannot_be_is_said_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = CausalLMTeacher.token_labels
    log_what_is_asked(tmp_path / "asked.log")
    monkeypatch.setattr(CausalLMTeacher, "token_labels", CausalLMTeacher.token_labels)
    try:
        said = sentence(tmp_path, selection={"budget": 40})
        assert (
            said
            == "selection.budget times run.rounds must be at most the 60 blocks of the pool, got 40 blocks x 2 = 80"
        )
        said = sentence(tmp_path, selection={"budget": None, "budget_tokens": 40 * LENGTH})
        assert (
            "selection.budget_tokens times run.rounds must be at most the 60 blocks of the pool, got 40 blocks of 16 tokens"
            in said
        )
        said = sentence(tmp_path, selection={"budget": None, "budget_tokens": LENGTH - 1})
        assert said == "selection.budget_tokens must be at least the 16 tokens of a block, got 15"
        write_tokenizer(tmp_path / "other", vocabulary=280)
        said = sentence(tmp_path, student={"tokenizer": "other"})
        assert "has 280 ids, fewer than the 300 of the teacher; use the tokenizer that made them" in said
        said = sentence(tmp_path, student={"config": {**settings_of(tmp_path)["student"]["config"], "vocab_size": 290}})
        assert "the student's last layer has 290 outputs, fewer than the 300 ids of the labels" in said
        said = sentence(
            tmp_path,
            run={"directory": "short"},
            student={"config": {**settings_of(tmp_path)["student"]["config"], "max_position_embeddings": 8}},
        )
        assert "the labels' blocks of 16 tokens are longer than the 8 positions of the student" in said
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
        said = sentence(tmp_path, run={"directory": "none"}, data={"pool": "text.parquet"})
        assert "data.pool has no column example_id" in said
        write_blocks(tmp_path / "long" / "a.parquet", 4, 1)
    finally:
        CausalLMTeacher.token_labels = labels
    assert not asked(tmp_path / "asked.log")


def test_a_student_of_a_folder_chooses_from_the_first_round_on(tmp_path: Path) -> None:
    from language_models import write_model

    write_model(tmp_path / "small", seed=3)
    student = {"config": None, "tokenizer": None, "model": "small"}
    budget = {"method": "entropy", "budget": None, "budget_tokens": 5 * LENGTH + 3, "compare_uniform": False}
    settings = settings_of(
        tmp_path,
        student=student,
        selection=budget,
        run={"rounds": 1, "compare_plain": False},
        labels={"kind": "sampled"},
    )
    root = run(settings, base=tmp_path)
    said = scored(root / "students" / "round=000", pool_of(tmp_path))
    best = np.argsort(-said.gains, kind="stable")[:5]
    assert sorted(bought(root)["pool_row"].to_pylist()) == sorted(best.tolist())
    found = json.loads((root / "report" / "metrics.json").read_text())
    assert found["rounds"][0]["mean_gain"]["bought"] > found["rounds"][0]["mean_gain"]["pool"]
    assert "plain" not in found
    assert "uniform" not in found
