"""What a run does with a teacher that is hardly better than the student that is to learn from it."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from problem import asked
from typer.testing import CliRunner

from distilbeam.pipelines import run
from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import parse_config
from distilbeam.pipelines.jobs import weak_teacher
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.labelling.pooled_labels import is_pooled

PAID_BEFORE = 60 + 80  # validation and test


def settings(problem: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(problem)
    data["selection"]["compare_uniform"] = False
    for name, values in sections.items():
        data.setdefault(name, {}).update(values)
    return data


def contrary(problem: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    """A teacher that says the opposite of what it knows."""
    data = settings(problem, data={"check_classes": False}, **sections)
    data["teacher"]["input"] = {"columns": ["x"], "scale": -1.0}
    return data


def test_a_teacher_no_better_than_the_student_ends_the_run_before_anything_is_bought(
    problem: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="the teacher is no better than the student that is to learn") as caught:
        run(contrary(problem), base=tmp_path)
    assert "--accept-weak-teacher" in str(caught.value)
    assert len(asked(tmp_path)) <= PAID_BEFORE
    assert not (tmp_path / "run" / "labels").exists()
    with pytest.raises(ValueError, match="no better"):  # nor does it without pooling
        run(contrary(problem, labels={"pooled": False}), base=tmp_path)


def test_one_that_is_accepted_is_pooled_with_the_student(
    problem: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        root = run(contrary(problem, run={"accept_weak_teacher": True, "rounds": 1}), base=tmp_path)
    (said,) = [record.getMessage() for record in caplog.records if "less than 10 points of lead" in record.getMessage()]
    assert said.startswith("On the 60 validation rows the teacher has ")
    assert "pooled labels are learned" in said
    standing = json.loads((root / "teacher" / "standing.json").read_text())
    assert standing["pooled"]
    assert standing["lead"] == pytest.approx(standing["teacher"] - standing["student"])
    assert standing["lead"] < 0
    assert is_pooled(root / "pooled" / "round=000")
    html = (root / "report" / "report.html").read_text()
    assert "The teacher was weak" in html
    # with the setting that was found written out, the students are the run's own
    explicit = contrary(problem, run={"accept_weak_teacher": True, "rounds": 1}, labels={"pooled": True})
    assert run(explicit, base=tmp_path) == root
    assert not (root / "variants").exists()


def test_a_good_teacher_is_believed(problem: dict[str, Any], tmp_path: Path) -> None:
    root = run(settings(problem, run={"rounds": 1}, training={"epochs": 1}), base=tmp_path)
    standing = json.loads((root / "teacher" / "standing.json").read_text())
    assert standing["lead"] >= weak_teacher.POINTS
    assert not standing["pooled"]
    assert not (root / "pooled").exists()


def test_what_cannot_be_pooled_is_learned_as_it_is_and_said(
    problem: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = contrary(
        problem,
        run={"accept_weak_teacher": True, "rounds": 1},
        labels={"kind": "top_k", "k": 2},
        training={"epochs": 1},
    )
    with caplog.at_level(logging.WARNING):
        root = run(data, base=tmp_path)
    assert any("since labels of kind top_k cannot be pooled" in record.getMessage() for record in caplog.records)
    assert not json.loads((root / "teacher" / "standing.json").read_text())["pooled"]


def test_a_run_that_had_bought_without_the_comparison_stays_as_it_was(problem: dict[str, Any], tmp_path: Path) -> None:
    first = settings(problem, run={"rounds": 1}, labels={"pooled": True})
    root = run(first, base=tmp_path)
    (root / "teacher" / "standing.json").unlink()
    root = run(settings(problem, run={"rounds": 2}), base=tmp_path)  # "auto"
    assert is_pooled(root / "pooled" / "round=001")
    assert not (root / "teacher" / "standing.json").exists()
    config = parse_config(settings(problem, run={"rounds": 2}))
    assert Run(config.relative_to(tmp_path), RunDirectory(root)).pooled


def test_the_option_is_the_setting(problem: dict[str, Any], tmp_path: Path) -> None:
    import tomli_w

    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(contrary(problem, run={"rounds": 1}, training={"epochs": 1})))
    refused = CliRunner().invoke(app, ["run", str(config)])
    assert isinstance(refused.exception, ValueError)
    done = CliRunner().invoke(app, ["train", str(config), "--round", "1", "--accept-weak-teacher"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "students" / "round=001").exists()
