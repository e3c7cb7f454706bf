"""What an extra is needed for is said with the extra's name before any work is done, for every setting and command."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from problem import asked
from typer.testing import CliRunner

from distilbeam.extras import MODULES, Need, require_extras
from distilbeam.pipelines import run
from distilbeam.pipelines.cli.main import app
from distilbeam.pipelines.config import parse_config
from distilbeam.pipelines.needs import needs_of


def test_every_extra_that_is_named_is_one_of_the_package() -> None:
    known = importlib.metadata.metadata("distilbeam").get_all("Provides-Extra")
    assert set(MODULES) <= set(known or ())


def test_what_is_missing_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        ValueError, match=r"^tuning needs optuna, which is not installed: pip install 'distilbeam\[tune\]'$"
    ):
        require_extras([Need("tuning", "tune")])
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs onnx and onnxruntime, .*'distilbeam\[onnx\]', or choose pt2"):
        require_extras([Need("x", "onnx", ("onnx", "onnxruntime"), way_round="choose pt2")])
    require_extras([Need("numbers", "onnx", ("numpy",))])


@pytest.mark.parametrize(
    ("section", "settings", "module", "sentence"),
    [
        ("teacher", {"kind": "onnx", "model": "t.onnx"}, "onnxruntime", "teacher.kind = 'onnx' needs onnxruntime"),
        (
            "teacher",
            {"kind": "huggingface", "model": "t"},
            "transformers",
            "teacher.kind = 'huggingface' needs transformers",
        ),
        ("training", {"tensorboard": True}, "tensorboard", "training.tensorboard needs tensorboard"),
        ("data", {"pool": "s3://b/pool"}, "s3fs", "data.pool = 's3://b/pool' needs s3fs"),
        ("data", {"pool": "gs://b/pool"}, "gcsfs", "data.pool = 'gs://b/pool' needs gcsfs"),
        (
            "student",
            {"kind": "text", "input": {"kind": "text", "columns": ["x"], "tokenizer": "t.json"}},
            "tokenizers",
            "student.input.tokenizer needs tokenizers",
        ),
    ],
)
def test_a_run_says_so_before_it_makes_anything(
    problem: Any, tmp_path: Path, monkeypatch, section, settings, module, sentence
):
    monkeypatch.setitem(sys.modules, module, None)
    if section == "teacher":
        problem["teacher"] = {"input": {"kind": "text", "columns": ["key"]}}
    if section == "student":
        problem["student"] = {}
    problem[section].update(settings)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run(problem, base=tmp_path)
    assert not (tmp_path / "run").exists()
    assert asked(tmp_path) == []


def test_a_run_of_base_packages_needs_nothing(problem: Any) -> None:
    assert list(needs_of(parse_config(problem))) == []


@pytest.mark.parametrize(
    ("words", "module", "sentence"),
    [
        (
            ["export", "c.toml"],
            "onnxruntime",
            r"--format onnx int8 int8-weights needs onnxruntime, .*distilbeam\[onnx\]', or name --format pt2 alone",
        ),
        (["export", "c.toml", "--format", "pt2", "--format", "int8"], "onnx", "--format int8 needs onnx,"),
        (
            ["export", "c.toml", "--format", "pruned"],
            "torch_pruning",
            "--format pruned needs torch_pruning, .*compress",
        ),
        (["tune", "c.toml"], "optuna", "distilbeam tune needs optuna"),
        (["pareto", "c.toml"], "torch_pruning", "pareto.strategies needs torch_pruning, .*or set pareto.strategies"),
        (["pareto", "c.toml"], "onnxruntime", "pareto.compressions needs onnxruntime, .*or set pareto.compressions"),
        (
            ["ingest", "x", "--out", "p", "--format", "tfrecord"],
            "google_crc32c",
            "--format tfrecord needs google_crc32c",
        ),
    ],
)
def test_a_command_says_so_before_it_does_anything(problem: Any, tmp_path: Path, monkeypatch, words, module, sentence):
    (tmp_path / "c.toml").write_text(tomli_w.dumps(problem))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    result = CliRunner().invoke(app, words)
    assert re.search(sentence, str(result.exception)), result.exception
    assert not list((tmp_path / "run").glob("*/*"))
