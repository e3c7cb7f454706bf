"""Settings of teachers: what is not valid is a sentence with a way out."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from distilbeam.teacher import load_teacher
from distilbeam.teacher.config import TfServingConfig, TorchConfig, parse_teacher_config

INPUT = {"column": "x"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {},
            "teacher.kind must be one of beam, causal_lm, huggingface, onnx, openai, savedmodel, tfserving, torch, got 'nothing'",
        ),
        (
            {"kind": "oracle"},
            "teacher.kind must be one of beam, causal_lm, huggingface, onnx, openai, savedmodel, tfserving, torch, got 'oracle'",
        ),
        ({"kind": "torch", "input": INPUT}, "teacher.model must be given"),
        (
            {"kind": "torch", "modell": "m:f", "input": INPUT},
            "teacher.model must be given\nteacher.modell is not a setting; did you mean teacher.model?",
        ),
        (
            {"kind": "torch", "model": "m:f", "input": {"column": "x", "shap": [3]}},
            "teacher.input.shap is not a setting; did you mean teacher.input.shape?",
        ),
        (
            {"kind": "onnx", "model": "m", "input": INPUT, "zzz": 1},
            "teacher.zzz is not a setting; the valid ones are answers, batch_rows, classes, input, kind, model, output, "
            "providers, threads",
        ),
        (
            {"kind": "torch", "model": "m:f", "input": {"column": "x", "std": [0.0]}},
            "teacher.input.std must be positive, got [0.0]",
        ),
        (
            {"kind": "torch", "model": "m:f", "input": INPUT, "batch_rows": 0},
            "teacher.batch_rows: must be greater than or equal to 1, got 0",
        ),
        (
            {"kind": "torch", "model": "m.pt2", "weights": "w", "input": INPUT},
            "teacher.weights and arguments must be left out for a .pt2 program, which contains them",
        ),
        (
            {"kind": "tfserving", "address": "a:1", "model": "m", "input": INPUT, "headers": {"a": {"evn": "A"}}},
            "teacher.headers.a.evn is not a setting; did you mean teacher.headers.a.env?",
        ),
    ],
)
def test_every_mistake_is_a_sentence(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole message is compared)
        load_teacher(data)
    assert str(caught.value) == message


def test_toml_is_taken_as_it_is_read() -> None:
    text = """
    kind = "tfserving"
    address = "teacher.internal:8500"
    model = "digits"
    version_label = "stable"
    tls = true
    ca_file = "ca.pem"
    input = { column = "image", kind = "raw" }
    headers.authorization = { file = "token", prefix = "Bearer " }
    """
    config = parse_teacher_config(tomllib.loads(text))
    assert isinstance(config, TfServingConfig)
    assert config.addresses == ("teacher.internal:8500",)
    resolved = config.relative_to(Path("/etc/run"))
    assert (resolved.ca_file, resolved.headers["authorization"].file) == ("/etc/run/ca.pem", "/etc/run/token")
    assert parse_teacher_config(config.model_dump(mode="json")) == config


def test_paths_are_resolved_and_names_are_not() -> None:
    base = Path("/data")
    text = {"kind": "text", "column": "t", "tokenizer": "tokenizer.json"}
    made = parse_teacher_config({"kind": "torch", "model": "m:f", "weights": "w.pt", "input": text}).relative_to(base)
    assert isinstance(made, TorchConfig)
    assert (made.model, made.weights, made.input.tokenizer) == ("m:f", "/data/w.pt", "/data/tokenizer.json")
    program = parse_teacher_config({"kind": "torch", "model": "sub/m.pt2", "input": INPUT}).relative_to(base)
    assert program.model_dump()["model"] == "/data/sub/m.pt2"
    assert (
        parse_teacher_config({"kind": "torch", "model": "/abs/m.pt2", "input": INPUT})
        .relative_to(base)
        .model_dump()["model"]
        == "/abs/m.pt2"
    )
