"""`--json FILE` writes figures, `--json -` gives standard output to them alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from labelling import Command, write_job
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.storage.files import read_json


def streams(*words: object) -> tuple[str, str]:
    """What a command says on standard output and on standard error."""
    out = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert out.exit_code == 0, out.output
    return out.stdout, out.stderr


def test_of_labels(command: Command, tmp_path: Path) -> None:
    write_job(tmp_path)
    out, err = streams("plan", "label.toml", "--json", "-")
    assert json.loads(out)["lines"][-1]["rows"] == 240
    assert "The pool has 240 rows" in err
    assert "The pool has 240 rows" in streams("plan", "label.toml")[0]  # as before, once more
    command("label")
    out, err = streams("verify", "job/labels", "--json", "-")
    found = json.loads(out)
    assert (found["ok"], found["rows"], found["problems"], found["comparison"]) == (True, 240, [], None)
    assert "everything is as the manifest says" in err
    streams("verify", "job/labels", "--json", "found.json", "--teacher", "label.toml", "--sample", 9)
    assert read_json(tmp_path / "found.json")["comparison"]["rows"] == 9
    next((tmp_path / "job/labels").glob("*.parquet")).unlink()
    broken = CliRunner().invoke(app, ["verify", "job/labels", "--json", "-"])
    assert (broken.exit_code, json.loads(broken.stdout)["ok"]) == (1, False)


@pytest.mark.slow
def test_of_a_run_and_its_student(problem: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    problem["run"]["rounds"] = 1
    Path("distilbeam.toml").write_text(tomli_w.dumps(problem))
    out, err = streams("evaluate", "distilbeam.toml", "--json", "-")
    assert json.loads(out) == read_json(tmp_path / "run/report/metrics.json")
    assert "train student 1" in err
    assert "accuracy" in err
    out, err = streams("evaluate", "run", "--data", "test.parquet", "--json", "-")  # the student that the run has kept
    figures = read_json(tmp_path / "run/report/metrics.json")
    kept = figures["kept"]["round"]
    assert json.loads(out)["data"]["accuracy"] == figures["students"][kept]["accuracy"]
    assert f"round=00{kept}" in err
