"""Whatever a setting of a teacher holds, the answer is a teacher or a sentence that names it."""

from __future__ import annotations

import itertools
import math
from datetime import date
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file

from distilbeam.teacher import load_teacher
from distilbeam.teacher.config import TeacherConfig, TfServingConfig, parse_teacher_config
from distilbeam.teacher.tfserving.channels import request_headers

INPUT = {"columns": ["x"]}
BASE: dict[str, dict[str, Any]] = {
    "torch": {"model": "torch.nn:Linear", "arguments": {"in_features": 4, "out_features": 3}},
    "onnx": {"model": "net.onnx"},
    "savedmodel": {"model": "folder"},
    "huggingface": {"model": "folder", "input": {"kind": "text", "columns": ["x"]}},
    "beam": {"handler": "collections:OrderedDict", "version": "1"},
    "tfserving": {"model": "m", "addresses": ["127.0.0.1:1"], "attempts": 1, "timeout_s": 0.2},
}
VALUES = [None, "", " ", "\0", "x" * 300, "../..", "a:b:c", "os:path", 0, -1, 10**30, 1.5, math.nan, math.inf, True, [], [""],
          ["a", "a"], [1, [2]], {}, {"a": math.nan}, {"a": date(2026, 1, 1)}, b"bytes", "2026", "é"]  # fmt: skip


def settings(kind: str) -> list[str]:
    (of_kind,) = (model for model in get_args(get_args(TeacherConfig)[0]) if model.model_fields["kind"].default == kind)
    left_out = {"kind", "input", *(["trust"] if kind == "savedmodel" else [])}  # which would load TensorFlow
    return [name for name in of_kind.model_fields if name not in left_out]


@pytest.mark.parametrize("kind", BASE)
def test_no_value_of_a_setting_is_a_traceback(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "a" / "b"
    (base / "folder").mkdir(parents=True)
    (base / "net.onnx").write_bytes(b"no model")
    for name, value in itertools.product(settings(kind), VALUES):
        data = {"kind": kind, "input": INPUT, **BASE[kind], name: value}
        sentence = refusal(data, base)
        assert sentence is None or (0 < len(sentence) < 1000), (name, value)


def refusal(data: dict[str, Any], base: Path) -> str | None:
    try:
        if data["kind"] == "tfserving":  # there is nobody to ask
            parse_teacher_config(data)
        else:
            load_teacher(data, base=base).close()
    except ValueError as e:
        return str(e)
    return None


def test_numbers_that_json_has_not_are_refused_in_arguments() -> None:
    for value in (math.nan, math.inf, [1, {"deep": -math.inf}]):
        with pytest.raises(ValueError, match=r"^teacher.arguments must be finite numbers, got "):
            load_teacher({"kind": "torch", "model": "torch.nn:Linear", "arguments": {"a": value}, "input": INPUT})
    with pytest.raises(
        ValueError, match=r"arguments must be text, numbers, .* got the date 2026-01-01; put it in quotes"
    ):
        load_teacher(
            {"kind": "torch", "model": "torch.nn:Linear", "arguments": {"a": date(2026, 1, 1)}, "input": INPUT}
        )


def test_arguments_that_do_not_suit_the_factory_are_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"teacher.arguments do not suit torch.nn:Linear: .*unexpected keyword"):
        load_teacher({"kind": "torch", "model": "torch.nn:Linear", "arguments": {"width": 3}, "input": INPUT})


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "text", "folder"])
def test_damaged_weights_are_a_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "teacher.safetensors"
    save_file(torch.nn.Linear(4, 3).state_dict(), path)
    data = path.read_bytes()
    damaged = {"cut": data[:-7], "header": b"\xff" * 8 + data[8:], "empty": b"", "text": b"no weights at all"}
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(damaged[damage])
    config = {**BASE["torch"], "kind": "torch", "weights": str(path), "input": INPUT}
    with pytest.raises(ValueError, match=r"teacher.weights: .*teacher.safetensors is damaged or no safetensors file"):
        load_teacher(config)


def test_weights_of_another_kind_of_thing_are_a_sentence(tmp_path: Path) -> None:
    for number, thing in enumerate(([torch.zeros(3)], torch.zeros(3), {"weight": 3, "bias": "x"}, 7)):
        torch.save(thing, path := tmp_path / f"{number}.pt")
        config = {**BASE["torch"], "kind": "torch", "weights": str(path), "input": INPUT}
        with pytest.raises(ValueError, match=r"teacher.weights: .*\.pt does not fit torch.nn:Linear"):
            load_teacher(config)


def served(**settings: Any) -> Any:
    return parse_teacher_config({"kind": "tfserving", "input": INPUT, **BASE["tfserving"], **settings})


def test_names_of_headers_are_sent_in_small_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    config = served(headers={"Authorization": {"env": "TOKEN", "prefix": "Bearer "}, "X-Team": {"env": "TOKEN"}})
    assert isinstance(config, TfServingConfig)
    assert request_headers(config.headers) == [("authorization", "Bearer secret"), ("x-team", "secret")]


@pytest.mark.parametrize("name", ["", "a b", "é", "grpc-timeout", ":path", "key-bin", "a\n"])
def test_names_that_are_no_headers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^teacher.headers: a header must "):
        served(headers={name: {"env": "TOKEN"}})


def test_a_header_is_named_once() -> None:
    with pytest.raises(ValueError, match=r"headers must be named once, in capitals or not, got A, a"):
        served(headers={"A": {"env": "T"}, "a": {"env": "T"}})
