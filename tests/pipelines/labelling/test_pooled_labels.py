"""Labels that pool the teacher's beliefs with the student's: what they say, what they leave alone, and a run that learns them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from problem import asked, labels_of

from distilbeam.pipelines.config import parse_config
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.labelling.pooled_labels import is_pooled, pool_labels, pooled_spec
from distilbeam.pipelines.steps import run
from distilbeam.selection.trust.pooling import BeliefPool
from distilbeam.student.checkpoint import load_student
from distilbeam.teacher.softlabels import decode, read_manifest

WEIGHTS = BeliefPool(0.7, -0.3, 0.4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run that learned the teacher's own labels."""
    from problem import write_problem

    base = tmp_path_factory.mktemp("finished")
    problem = write_problem(base)
    return run(problem, base=base), problem


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_pooled_labels_are_the_pools_and_everything_else_is_as_it_was(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, _ = finished
    source, target, student = root / "labels" / "round=000", tmp_path / "pooled", root / "students" / "round=000"
    before = contents(source)
    pool_labels(source, target, student, WEIGHTS)
    assert contents(source) == before
    old, new = labels_of(source), labels_of(target)
    spec, was = read_manifest(target).spec, read_manifest(source).spec
    assert spec == pooled_spec(was)
    assert spec.differences(was), "they are never taken for the teacher's"
    (batch,) = old.combine_chunks().to_batches()
    logits = load_student(student).logits(batch)
    expected = WEIGHTS.labels(decode(old, was).logprobs, logits)
    np.testing.assert_allclose(decode(new, spec).logprobs, expected, rtol=1e-3, atol=1e-3)
    assert np.abs(decode(new, spec).logprobs - decode(old, was).logprobs).max() > 0.1
    same = [
        name for name in old.column_names if name not in ("alpha", "candidates", "weight") and "teacher" not in name
    ]
    assert {"example_id", "x", "gain", "pool_row"} <= set(same)
    assert new.select(same).equals(old.select(same))
    assert not {"alpha", "candidates", "weight"} & set(new.column_names)
    top = np.sort(np.exp(expected), axis=1)
    np.testing.assert_allclose(new["teacher_margin"], top[:, -1] - top[:, -2], atol=2e-3)


def test_a_killed_pooling_goes_on_and_ends_the_same(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, _ = finished
    source, student = root / "labels" / "round=000", root / "students" / "round=000"
    whole, half = tmp_path / "whole", tmp_path / "half"
    pool_labels(source, whole, student, WEIGHTS)
    pool_labels(source, half, student, WEIGHTS)
    (tmp_path / "half.beliefs.json").unlink()
    entry = next((half / "_manifest").glob("*.json"))
    (half / json.loads(entry.read_text())["path"]).unlink()
    entry.unlink()
    assert is_pooled(whole)
    assert not is_pooled(half)
    kept = {path.name: path.stat().st_mtime_ns for path in half.glob("*.parquet")}
    pool_labels(source, half, student, WEIGHTS)
    assert contents(half) == contents(whole)
    assert all((half / name).stat().st_mtime_ns == time for name, time in kept.items()), (
        "what was there is not made again"
    )
    assert len(kept) == len(list(half.glob("*.parquet"))) - 1 > 0


def test_a_run_learns_pooled_labels_and_pays_for_the_teachers(
    finished: tuple[Path, dict[str, Any]], problem: dict[str, Any], tmp_path: Path
) -> None:
    plain, _ = finished
    root = run(problem | {"labels": {"pooled": True}}, base=tmp_path)
    for number in range(2):
        name = f"round={number:03d}"
        beliefs = json.loads((root / "pooled" / f"{name}.beliefs.json").read_text())
        assert set(beliefs) == {"teacher", "doubt", "student"}
        assert labels_of(root / "pooled" / name)["pool_row"].equals(labels_of(root / "labels" / name)["pool_row"])
    first = labels_of(root / "labels" / "round=000")
    assert first.equals(labels_of(plain / "labels" / "round=000")), "the teacher's labels are stored as ever"
    weights = [load_student(where / "students" / "round=001").module.state_dict() for where in (root, plain)]
    assert any(not weights[0][name].equal(weights[1][name]) for name in weights[0])
    start = [load_student(where / "students" / "round=000").module.state_dict() for where in (root, plain)]
    assert all(start[0][name].equal(start[1][name]) for name in start[0])
    assert is_pooled(root / "uniform" / "pooled" / "round=000")
    paid = asked(tmp_path)
    run(problem | {"labels": {"pooled": True}}, base=tmp_path)
    assert asked(tmp_path) == paid
    config = parse_config(problem | {"labels": {"pooled": True}})
    pooled = Run(config.relative_to(tmp_path), RunDirectory(root))
    assert pooled.soft_labels == [root / "pooled" / f"round={number:03d}" for number in range(2)]
    assert pooled.provenance()["soft_labels"]["spec"]["teacher"].endswith("pooled with the student that chose")


def test_the_weights_are_those_that_fit_the_validation_set(problem: dict[str, Any], tmp_path: Path) -> None:
    root = run(problem | {"labels": {"pooled": True}, "run": {**problem["run"], "rounds": 1}}, base=tmp_path)
    beliefs = json.loads((root / "pooled" / "round=000.beliefs.json").read_text())
    validation = pq.read_table(tmp_path / "validation.parquet")
    temperature = json.loads((root / "teacher" / "calibration.json").read_text())["temperature"]
    manifest = read_manifest(root / "teacher" / "validation")
    answers = decode(labels_of(root / "teacher" / "validation"), manifest.spec).logprobs / temperature
    (batch,) = validation.combine_chunks().to_batches()
    logits = load_student(root / "students" / "round=000").logits(batch)
    expected = BeliefPool.fit(answers, logits, validation["label"].to_numpy())
    assert beliefs == pytest.approx(expected.to_json(), rel=1e-3)


def test_draws_are_refused_for_other_divergences_before_anything_is_bought(problem: dict[str, Any]) -> None:
    changes = {"labels": {"kind": "sampled", "k": 8}, "training": {"objective": "jsd"}}
    with pytest.raises(ValueError, match=r"^training.objective must be 'distill' with labels of kind 'sampled'"):
        parse_config(problem | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"pooled": True, "kind": "top_k", "k": 2}}, "labels.kind must be 'dense' with labels.pooled"),
        (
            {"labels": {"pooled": True}, "training": {"objective": "weighted"}},
            "training.objective must be 'distill' with labels.pooled",
        ),
        ({"labels": {"pooled": True}, "training": {"finetune": {}}}, "training.finetune must be left out with"),
    ],
)
def test_what_cannot_be_pooled_is_a_sentence(problem: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        parse_config(problem | changes)
