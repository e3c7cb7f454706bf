"""`distilbeam launch`: the training of a file under the one command, and under the names of modules that go on working."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tomli_w
from problem import make_table
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.student.checkpoint import load_student

MODULES = (["distilbeam", "launch"], ["distilbeam.student.launch"], ["distilbeam.student.training.launch"])


@pytest.fixture
def training(tmp_path: Path) -> Path:
    for name, rows, seed in (("labelled", 60, 2), ("validation", 30, 3)):
        pq.write_table(make_table(rows, seed, labelled=True), tmp_path / f"{name}.parquet")
    data = {"labelled": "labelled.parquet", "validation": "validation.parquet", "classes": ["0", "1", "2"]}
    settings = {"data": data, "student": {"hidden": [8], "input": {"columns": ["x"]}}, "training": {"epochs": 1}}
    (path := tmp_path / "training.toml").write_text(tomli_w.dumps(settings))
    return path


def test_a_file_is_trained_wherever_the_command_is_given(
    training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    words = ["--set", "training.epochs=2", "--set", "student.hidden=[5]", "--set", "data.directory=small"]
    out = CliRunner().invoke(app, ["launch", f"../{training.name}", *words])
    assert out.exit_code == 0, out.exception
    directory, *figures = out.output.splitlines()
    assert directory == str(tmp_path / "small")
    assert next(line.split() for line in figures) == ["epochs", "2"]
    assert len({line.rindex(" ") for line in figures if line.startswith("  ")}) == 1, "figures stand below each other"
    student = load_student(tmp_path / "small")
    assert (student.config.hidden, student.classes) == ((5,), ("0", "1", "2"))
    again = CliRunner().invoke(app, ["launch", str(training), *words])
    assert isinstance(again.exception, FileExistsError)


def test_a_dry_run_says_what_is_learned_and_trains_nothing(training: Path, tmp_path: Path) -> None:
    def said(*words: str) -> str:
        out = CliRunner().invoke(app, ["launch", str(training), "--dry-run", *words], catch_exceptions=False)
        assert out.exit_code == 0
        return out.output

    before = sorted(tmp_path.rglob("*"))
    assert said().startswith(
        f"1 epoch(s) of 60 human-labelled row(s), 64 at a time, into {tmp_path / 'student'}: nothing of it"
    )
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "student.training").mkdir()
    assert "a stopped training is there, which would go on" in said("--set", "training.epochs=2")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "student.json").write_text("{}")
    assert "the student is there already" in said("--set", "data.directory=other")
    with pytest.raises(ValueError, match="none/_manifest"):
        said("--set", "data.soft_labels=['none']")


def test_files_of_other_commands_are_refused_with_theirs(tmp_path: Path) -> None:
    for sections, command in ((("run", "selection", "teacher", "student"), "run"), (("data", "teacher"), "label")):
        (path := tmp_path / "given.toml").write_text("".join(f"[{name}]\n" for name in sections))
        out = CliRunner().invoke(app, ["launch", str(path)])
        assert isinstance(out.exception, ValueError)
        assert f"'distilbeam {command} {path}' does it" in str(out.exception)


@pytest.mark.parametrize("module", MODULES, ids=" ".join)
def test_a_mistake_is_one_sentence_under_every_name(module: list[str], training: Path) -> None:
    environment = os.environ | {"RANK": "0"}
    command = [sys.executable, "-m", *module, str(training), "--set", "training.epoch=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: training.epoch is not a setting; did you mean training.epochs?\n"
