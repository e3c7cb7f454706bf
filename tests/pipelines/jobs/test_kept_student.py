"""Which student is kept when a round made it worse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from distilbeam.pipelines import run
from distilbeam.pipelines.config import parse_config
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.kept_student import kept_round, kept_student, worse_sentence
from distilbeam.pipelines.jobs.run import Run

ROWS = 60


def small(problem: dict[str, Any], rounds: int) -> dict[str, Any]:
    data = copy.deepcopy(problem)
    data["run"]["rounds"], data["training"]["epochs"] = rounds, 1
    data["selection"] |= {"budget": 5, "compare_uniform": False}
    return data


def answering(run_of: Run, rights: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the student of each round have the first so many validation rows right, and all others wrong."""
    truth = run_of.truth("validation")

    def logits(student: Path, name: str) -> np.ndarray:
        assert name == "validation"
        right = np.arange(ROWS) < rights[int(student.name.removeprefix("round="))]
        return np.eye(3, dtype=np.float32)[np.where(right, truth, (truth + 1) % 3)]

    monkeypatch.setattr(run_of, "student_logits", logits)


def test_a_student_is_kept_until_a_later_one_is_no_worse(
    problem: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run(small(problem, 3), base=tmp_path)
    run_of = Run(parse_config(small(problem, 3)).relative_to(tmp_path), RunDirectory(root))
    answering(run_of, [40, 50, 45, 46], monkeypatch)
    # five of five lost: 1 in 32 under chance; four of four: 1 in 16, which is within the uncertainty
    kept, worse = kept_round(run_of)
    assert kept == 3
    assert [found["round"] for found in worse] == [2]
    assert worse[0]["p"] == 1 / 32
    sentence = worse_sentence(worse[0])
    assert sentence.startswith("Round 2 made the student worse: 75.0% of the validation rows right after 83.3%")
    assert sentence.endswith("the student of round 1 is kept")
    answering(run_of, [40, 50, 45, 44], monkeypatch)
    assert kept_round(run_of)[0] == 1
    assert kept_student(run_of) == root / "students" / "round=001"
    assert kept_student(run_of, 3) == root / "students" / "round=003"
    assert kept_round(run_of, 2)[0] == 1


def test_a_worse_round_is_said_and_the_kept_student_is_exported(
    problem: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import tomli_w

    from distilbeam.pipelines.cli.main import app

    truths: dict[str, np.ndarray] = {}
    real = Run.student_logits

    def logits(self: Run, student: Path, name: str) -> np.ndarray:
        if name != "validation":
            return real(self, student, name)
        truth = truths.setdefault(name, self.truth(name))
        right = np.arange(ROWS) < {"round=000": 50, "round=001": 20}[student.name]
        return np.eye(3, dtype=np.float32)[np.where(right, truth, (truth + 1) % 3)]

    monkeypatch.setattr(Run, "student_logits", logits)
    data = small(problem, 1)
    data["run"]["accept_weak_teacher"] = True
    root = run(data, base=tmp_path)
    assert any("Round 1 made the student worse" in record.getMessage() for record in caplog.records)
    assert "Round 1 made the student worse" in (root / "report" / "report.html").read_text()
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(data))
    done = CliRunner().invoke(app, ["export", str(config), "--format", "pt2"])
    assert done.exit_code == 0, done.output
    assert (root / "exports" / "round=000" / "pt2").exists()
