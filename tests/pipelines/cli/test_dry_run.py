"""`--dry-run`: what `plan` says, and nothing is asked or written; `--json` is written before anything is printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from labelling import Command, write_job
from problem import SUPPORT, asked
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app


def files(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.is_file()}


def without_times(output: str) -> list[str]:
    return [line for line in output.splitlines() if "✓" not in line]


def test_of_a_labelling_job(command: Command, tmp_path: Path) -> None:
    write_job(tmp_path)
    before = files(tmp_path)
    said = command("label", "--dry-run")
    assert "The pool has 240 rows in 4 file(s); 0 are labelled, 240 are not." in said
    assert without_times(said) == without_times(command("plan"))
    assert (files(tmp_path), asked(tmp_path)) == (before, [])
    command("label")
    asked_once = asked(tmp_path)
    assert "240 are labelled, 0 are not" in command("label", "--dry-run")
    assert asked(tmp_path) == asked_once


def test_it_is_for_what_is_there(command: Command, tmp_path: Path) -> None:
    write_job(tmp_path)
    with pytest.raises(ValueError, match="--dry-run is for what is there already, --watch labels what arrives"):
        command("label", "--dry-run", "--watch", "pool")


def test_of_a_verification_that_asks(command: Command, tmp_path: Path) -> None:
    write_job(tmp_path)
    command("label")
    before = asked(tmp_path)
    words = ["verify", "job/labels", "--teacher", "label.toml", "--dry-run"]
    said = CliRunner().invoke(app, [*words, "--sample", "12"], catch_exceptions=False).output
    assert said == "The teacher would be asked about 12 of the 240 rows of job/labels; nothing was asked.\n"
    assert "about 240 of the 240 rows" in CliRunner().invoke(app, words, catch_exceptions=False).output
    assert asked(tmp_path) == before
    alone = CliRunner().invoke(app, ["verify", "job/labels", "--dry-run"])
    assert "--dry-run is for --teacher" in str(alone.exception)


def test_of_a_run(problem: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "distilbeam.toml").write_text(tomli_w.dumps(problem))
    before = files(tmp_path)
    outputs = []
    for words in (["run", "distilbeam.toml", "--dry-run"], ["plan", "distilbeam.toml"]):
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        outputs.append(without_times(result.output))
    assert outputs[0] == outputs[1]
    assert any(re.match(r" round 2: ask the teacher +30 +30 ", line) for line in outputs[0])
    assert (files(tmp_path), asked(tmp_path)) == (before, [])


def test_json_is_written_where_nobody_reads_what_is_printed(tmp_path: Path) -> None:
    write_job(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    reader, writer = os.pipe()
    os.close(reader)  # as `| head -0` would
    command = [sys.executable, "-m", "distilbeam", "plan", "label.toml", "--json", "plan.json"]
    with os.fdopen(writer, "w") as closed:
        out = subprocess.run(
            command, stdout=closed, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path, check=False
        )
    assert "Traceback" not in out.stderr
    assert json.loads((tmp_path / "plan.json").read_text())
