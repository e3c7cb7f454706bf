"""A student, an export and a run are opened alike; a run's model is the one that its figures are about."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distilbeam.pipelines.prediction.opened_model import open_model
from distilbeam.student.export.export import export_student


@pytest.fixture
def run(student: Path, tmp_path: Path) -> Path:
    """A run whose figures say that the student of round 1 is kept, as `pipelines/report/metrics.py` writes them."""
    for number in range(3):
        shutil.copytree(student, tmp_path / "run" / "students" / f"round={number:03d}")
    (tmp_path / "run" / "config.toml").write_text("")
    (tmp_path / "run" / "report").mkdir()
    return tmp_path / "run"


def write_figures(run: Path, **figures: object) -> None:
    (run / "report" / "metrics.json").write_text(json.dumps(figures))


def test_a_student_and_its_exports(student: Path, tmp_path: Path) -> None:
    assert open_model(student)[0] == student
    exported = export_student(student, "pt2", tmp_path / "pt2")
    directory, model = open_model(exported)
    assert directory == exported
    assert model.classes == ("0", "1", "2")
    assert model.fingerprint() == json.loads((exported / "export.json").read_text())["digest"]


def test_the_student_that_a_run_kept(run: Path) -> None:
    write_figures(run, kept={"round": 1, "worse": []})
    assert open_model(run)[0] == run / "students" / "round=001"
    write_figures(run, kept={"round": 1}, final={"directory": "final/round=002-ab", "student": None})
    assert open_model(run)[0] == run / "students" / "round=001"
    shutil.copytree(run / "students" / "round=002", run / "final" / "round=002-ab" / "student")
    write_figures(run, kept={"round": 1}, final={"directory": "final/round=002-ab", "student": "student"})
    assert open_model(run)[0] == run / "final" / "round=002-ab" / "student"


def test_what_holds_no_model_is_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run has no figures yet, .* 'distilbeam evaluate CONFIG' does what is left"):
        open_model(run)
    write_figures(run, kept={"round": 7})
    with pytest.raises(ValueError, match=r"round=007, which .* says is kept, is not there; name another student"):
        open_model(run)
    with pytest.raises(ValueError, match=r"STUDENT must be the directory of a student.* got .*none: none is there"):
        open_model(tmp_path / "none")
    with pytest.raises(ValueError, match="must hold a student"):
        open_model(run / "report")
