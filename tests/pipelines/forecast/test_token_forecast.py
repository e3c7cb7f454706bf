"""What a run of a language model will cost: blocks and tokens, and a sample whose labels no round asks again."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from language_runs import asked, log_what_is_asked, write_run
from typer.testing import CliRunner

from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.engine.model_cache import forget_models
from distilbeam.teacher.tokens.causal_lm import CausalLMTeacher

pytest.importorskip("transformers", reason="needs distilbeam[hf]")


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_plan_asks_nobody_and_a_sample_is_bought_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = str(write_run(tmp_path, selection={"compare_uniform": False}))
    forget_models()
    labels = CausalLMTeacher.token_labels
    log_what_is_asked(tmp_path / "asked.log")
    try:
        said = call("run", config, "--dry-run")
        assert "2 round(s) of 12 blocks buy 384 of the pool's 960 tokens" in said
        assert not asked(tmp_path / "asked.log")
        assert not (tmp_path / "run").exists()
        call("plan", config, "--sample", "8", "--json", str(tmp_path / "forecast.json"))
        forecast = json.loads((tmp_path / "forecast.json").read_text())
        rows = {line["what"]: line["rows"] for line in forecast["lines"]}
        assert rows["sample, asked"] == 8
        assert rows["ask the teacher about the validation blocks"] == 10
        assert rows["round 2: choose 12 blocks (192 tokens)"] == 48
        assert all(line["seconds"] > 0 for line in forecast["lines"][1:] if line["calls"])
        sampled = asked(tmp_path / "asked.log")
        assert len(sampled) == 8
        call("label", config, "--round", "0")
    finally:
        CausalLMTeacher.token_labels = labels
    bought = set(pq.read_table(tmp_path / "run" / "labels" / "round=000")["example_id"].to_pylist())
    assert bought & set(sampled), "the draw of seed 0 has one of the sample"
    assert set(asked(tmp_path / "asked.log").values()) == {1}
