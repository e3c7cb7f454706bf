"""A run whose training was cut off goes on inside it, and ends as an undisturbed one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from problem import write_problem

from distilbeam.pipelines.steps import run
from distilbeam.student.checkpoint import load_student
from distilbeam.student.training.checkpoints import TrainingDirectory
from distilbeam.teacher.softlabels import read_manifest


class CutOff(Exception):  # noqa: N818 - no error
    """The process ends here."""


def problem(directory: Path, **training: Any) -> dict[str, Any]:
    config = write_problem(directory, pool_rows=60, files=2)
    config["run"]["rounds"] = 1
    config["selection"]["compare_uniform"] = False
    config["training"] = {"epochs": 4, "batch_size": 8, "checkpoint_seconds": 0, **training}
    return config


def students(root: Path) -> dict[str, str]:
    return {path.parent.name: load_student(path.parent).fingerprint() for path in root.rglob("model.safetensors")}


def test_a_round_goes_on_inside_its_training(tmp_path, monkeypatch, caplog):
    config = problem(tmp_path / "d")
    undisturbed = run(config, base=tmp_path / "d", until=("train", 1))
    config["run"]["directory"] = "cut off"
    save, saved = TrainingDirectory.save, []

    def cut_off(directory, state):
        save(directory, state)
        saved.append(directory.path.name)
        if saved.count("round=001.training") == 7:
            raise CutOff

    with monkeypatch.context() as patched:
        patched.setattr(TrainingDirectory, "save", cut_off)
        with pytest.raises(CutOff):
            run(config, base=tmp_path / "d", until=("train", 1))
    steps = sorted((tmp_path / "d/cut off/students/round=001.training").glob("step-*"))
    assert [path.name for path in steps] == [f"step-{n:012d}.safetensors" for n in (6, 7)]
    config["training"]["log_steps"] = 5  # what is seen of a training may change on the way
    with caplog.at_level(logging.INFO, "distilbeam"):
        root = run(config, base=tmp_path / "d", until=("train", 1))
    assert "going on after step 7 of the training" in caplog.text
    assert students(root) == students(undisturbed)
    assert len(students(root)) == 2
    assert sorted(path.name for path in (root / "students").iterdir()) == ["round=000", "round=001"]


def test_a_run_estimates_weights_again_and_fine_tunes_blind_students(tmp_path):
    """Both need the teacher's answers for a labelled set, which the run asks for."""
    weighted = problem(tmp_path / "weighted", objective="weighted", reestimate_epochs=1)
    root = run(weighted, base=tmp_path / "weighted", until=("train", 1))
    plain = problem(tmp_path / "plain", objective="weighted")
    assert students(root) != students(run(plain, base=tmp_path / "plain", until=("train", 1)))

    blind = problem(tmp_path / "blind", finetune={"epochs": 2})
    root = run(blind, base=tmp_path / "blind", until=("train", 1))
    found = {path.name: load_student(path).extra["metrics"] for path in (root / "students").iterdir()}
    assert sorted(found) == ["round=000", "round=001", "round=001.blind"]
    assert (found["round=001.blind"]["soft_rows"], found["round=001.blind"]["hard_rows"]) == (30, 0)
    assert (found["round=001"]["soft_rows"], found["round=001"]["hard_rows"]) == (15, 15)
    assert found["round=001"]["epochs"] == 2
    temperatures = [read_manifest(root / name).spec.temperature for name in ("labels/round=000", "teacher/labelled")]
    assert temperatures[0] == temperatures[1] != 1, "both phases learn from the same teacher"
