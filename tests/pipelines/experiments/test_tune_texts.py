"""The search for a text student's n-grams: its default space can be trained, and a run takes what it found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from problem import add_texts, asked
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import load_config
from distilbeam.pipelines.experiments.tune import with_settings
from distilbeam.student.search.space import default_space

pytest.importorskip("optuna", reason="optuna is not installed")


def invoke(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_what_is_found_for_texts_is_learned_by_a_run(problem: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    settings = add_texts(tmp_path, problem)
    settings["selection"]["compare_uniform"] = False
    settings["tune"] = {"trials": 3, "startup": 3, "cut": False}
    config.write_text(tomli_w.dumps(settings))
    invoke("run", str(config))
    questions = len(asked(tmp_path))
    said = invoke("tune", str(config), "--dry-run")
    assert said.startswith("3 trials over training.lr, ")
    assert "student.hidden" in said
    assert not (tmp_path / "run" / "tune").exists()
    output = invoke("tune", str(config))
    assert "3 trials: 3 complete" in output
    assert "3 trained already" in invoke("tune", str(config), "--dry-run").replace("\n", " ")
    found = json.loads((tmp_path / "run" / "tune" / "results.json").read_text())["trials"]
    searched = {"student.hidden", "student.input.ngrams", "student.input.analyzer", "student.input.buckets"}
    assert all(searched <= set(trial["settings"]) for trial in found)
    best = min(found, key=lambda trial: trial["value"])["settings"]
    overlay = f"@{tmp_path / 'run' / 'tune' / 'best.toml'}"
    chosen = load_config(config, [overlay]).student
    for name in ("ngrams", "analyzer", "buckets"):
        value = best[f"student.input.{name}"]
        assert getattr(chosen.input, name) == (tuple(value) if isinstance(value, list) else value)
    assert chosen.input.columns == ("text",)
    assert list(chosen.hidden) == best["student.hidden"]
    invoke("run", str(config), "--set", overlay)
    (variant,) = (tmp_path / "run" / "variants").iterdir()
    student = json.loads((variant / "students" / "round=002" / "student.json").read_text())
    assert student["config"]["input"]["buckets"] == best["student.input.buckets"]
    assert len(asked(tmp_path)) <= questions + 12 * (
        1 + 60
    )  # the teacher's latency is measured for a report, nothing is bought


def test_every_value_of_the_space_is_a_configuration(problem: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(add_texts(tmp_path, problem)))
    read = load_config(config)
    for name, values in default_space(read.student).items():
        for value in values.choices or (values.low, values.high):
            made = with_settings(read, {name: value})
            section: Any = made
            for part in name.split("."):
                section = getattr(section, part)
            assert section == (tuple(value) if isinstance(value, list | tuple) else value)
