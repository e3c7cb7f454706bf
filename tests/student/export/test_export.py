"""Exports: the same answers in another runtime, what is beside them, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import flushes
import numpy as np
import pyarrow as pa
import pytest
import torch
from flushes import flushes_of

from distilbeam.inputs.config import InputConfig
from distilbeam.storage.files import sweep
from distilbeam.student.checkpoint import load_student, save_student
from distilbeam.student.export.export import FORMATS, export_student
from distilbeam.student.export.load import load_export
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.config import StudentConfig
from distilbeam.teacher.load import load_teacher

PIXELS = InputConfig(columns=("pixels",), shape=(3, 8, 8))


@pytest.fixture(scope="module")
def cnn(tmp_path_factory):
    """A convolutional student whose norms have seen data."""
    config = StudentConfig(kind="cnn", width=0.25, residual="plain", input=PIXELS)
    torch.manual_seed(0)
    module = build_student(config, (3, 8, 8), 3)
    module.train()
    for _ in range(20):
        module(torch.randn(64, 3, 8, 8) + 0.5)
    return save_student(tmp_path_factory.mktemp("cnn") / "s", module, config, ("a", "b", "c"), (3, 8, 8), {"seed": 4})


@pytest.fixture(scope="module")
def pool():
    return np.random.default_rng(1).standard_normal((256, 3, 8, 8), np.float32) + 0.5


@pytest.fixture(scope="module")
def exports(cnn, pool, tmp_path_factory):
    """The student in every format."""
    where = tmp_path_factory.mktemp("exports")
    return {name: export_student(cnn, name, where / name, pool, {"pool": "pool.parquet"}) for name in FORMATS}


@pytest.mark.parametrize(
    ("format_", "bound", "bytes_each", "bytes_more"),
    # rounding weights, or weights and activations, of 8 layers to 8 bits moves logits by a few percent of their spread
    [
        ("pt2", 1e-5, 4, 160_000),
        ("onnx", 1e-5, 4, 16_000),
        ("int8", 0.12, 1, 20_000),
        ("int8-weights", 0.02, 1, 20_000),
    ],
)
def test_an_export_answers_as_the_student(cnn, exports, format_, bound, bytes_each, bytes_more):
    student, export = load_student(cnn), load_export(exports[format_])
    inputs = np.random.default_rng(2).standard_normal((300, 3, 8, 8), np.float32) + 0.5
    expected = student.logits_of_inputs(inputs)
    found = export.logits_of_inputs(inputs)
    assert np.sqrt(np.mean((found - expected) ** 2)) <= bound * expected.std()
    for rows in (1, 2, 77):  # any batch size
        np.testing.assert_allclose(export.logits_of_inputs(inputs[:rows]), found[:rows], atol=1e-5)
    assert export.size_bytes < bytes_each * student.num_parameters + bytes_more


@pytest.mark.parametrize("format_", FORMATS)
def test_what_lies_beside_an_export(cnn, exports, format_):
    description = json.loads((exports[format_] / "export.json").read_text())
    assert description["format"] == format_
    assert description["classes"] == ["a", "b", "c"]
    assert description["input"] == {"columns": ["pixels"], "shape": [3, 8, 8]}
    assert description["student"]["fingerprint"] == load_student(cnn).fingerprint()
    assert description["student"]["config"]["width"] == 0.25
    assert description["student"]["seed"] == 4
    assert description["examples"] == {"rows": 256, "pool": "pool.parquet"}
    assert description["compared_with_student"]["rows"] == 64
    there = ["README.md", "export.json", description["file"], "reader.py"]
    assert sorted(path.name for path in exports[format_].iterdir()) == there


@pytest.mark.parametrize("format_", ["pt2", "onnx", "int8"])
def test_an_export_is_a_teacher(exports, pool, format_):
    directory = exports[format_]
    description = json.loads((directory / "export.json").read_text())
    flat = pa.FixedSizeListArray.from_arrays(pa.array(pool[:5].reshape(-1)), 192)
    batch = pa.record_batch({"pixels": flat, "id": pa.array(range(5))})
    teacher = load_teacher(description["teacher"], base=directory)
    export = load_export(directory)
    np.testing.assert_allclose(teacher.logits(batch), export.logits(batch), atol=1e-5)
    np.testing.assert_allclose(export.logits(batch), export.logits_of_inputs(pool[:5]), atol=1e-5)
    teacher.close()


def test_quantised_weights_are_the_weights_rounded_to_127_steps_per_channel(tmp_path):
    config = StudentConfig(kind="linear", input=InputConfig(columns=("x",)))
    module = build_student(config, (6,), 3)
    student = save_student(tmp_path / "s", module, config, "abc", (6,))
    export = load_export(export_student(student, "int8-weights", tmp_path / "e"))
    weight, bias = module[1].weight.detach().numpy(), module[1].bias.detach().numpy()
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    rounded = np.round(weight / step) * step
    np.testing.assert_allclose(export.logits_of_inputs(np.eye(6, dtype=np.float32)), rounded.T + bias, atol=1e-6)


def test_learned_residuals_are_exported(tmp_path):
    inputs = InputConfig(columns=("x",))
    config = StudentConfig(kind="mlp", hidden=(8, 8, 8), residual="laurel-rw+lr+pa", rank=2, input=inputs)
    module = build_student(config, (5,), 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    student = save_student(tmp_path / "s", module, config, "abc", (5,))
    for format_ in ("pt2", "onnx"):  # compared with the student by the export itself
        found = json.loads((export_student(student, format_, tmp_path / format_) / "export.json").read_text())
        assert found["compared_with_student"]["same_class"] == 1.0


def test_what_is_refused(cnn, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="format must be one of pt2, onnx, int8, int8-weights, got 'tflite'"):
        export_student(cnn, "tflite", tmp_path / "e")
    with pytest.raises(ValueError, match="int8 needs examples to calibrate on, got none; give it some of the pool"):
        export_student(cnn, "int8", tmp_path / "e")
    with pytest.raises(ValueError, match="holds no student"):
        export_student(tmp_path, "pt2", tmp_path / "e")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="already holds something; choose another directory or remove it"):
        export_student(cnn, "pt2", tmp_path / "full")
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(
        ValueError, match=r"the format onnx needs onnxscript, which is not installed: pip install 'distilbeam\[onnx\]'"
    ):
        export_student(cnn, "onnx", tmp_path / "e")
    assert not (tmp_path / "e").exists()
    assert set(FORMATS) == {"pt2", "onnx", "int8", "int8-weights"}
    assert list(tmp_path.glob(".*.tmp")) == []


@pytest.mark.parametrize("format_", ["pt2", "int8-weights"])
def test_an_export_is_flushed_before_it_has_its_name(cnn, pool, tmp_path, format_):
    target = tmp_path / "exports" / format_
    before, after = flushes_of(lambda: export_student(cnn, format_, target, pool), target)
    assert before == {"", *(path.name for path in target.iterdir())}
    assert len(before) == 5
    assert after == [target.parent]


def test_an_export_killed_before_its_rename_is_not_there(cnn, pool, tmp_path):
    arguments = str(cnn), "pt2", str(tmp_path / "e")
    code = "import sys; from flushes import die_at_flush; from distilbeam.student.export.export import export_student;"
    code += f"die_at_flush(5); export_student(*{arguments})"  # the last flush before the rename
    support = {"PYTHONPATH": str(Path(flushes.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **support}, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "e").exists()
    assert sweep(tmp_path) == 1
    assert list(tmp_path.iterdir()) == []
    export_student(cnn, "pt2", tmp_path / "e", pool)


def test_an_export_that_answers_otherwise_is_not_written(cnn, pool, tmp_path, monkeypatch):
    wrong = lambda file: lambda inputs: np.zeros((len(inputs), 3), np.float32)  # noqa: ARG005, E731
    monkeypatch.setattr("distilbeam.student.export.export.open_runner", wrong)
    with pytest.raises(RuntimeError, match=r"the exported \.pt2 file answers otherwise than the student"):
        export_student(cnn, "pt2", tmp_path / "e", pool)
    assert not (tmp_path / "e").exists()


def test_a_damaged_export_is_refused(exports, tmp_path):
    directory = Path(shutil.copytree(exports["pt2"], tmp_path / "e"))
    file = directory / "model.pt2"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="is not the file that was exported: its digest differs"):
        load_export(directory)
    with pytest.raises(ValueError, match=r"holds no export: export\.json is missing"):
        load_export(tmp_path)
    description = json.loads((directory / "export.json").read_text())
    (directory / "export.json").write_text(json.dumps(description | {"format_version": 9}))
    with pytest.raises(ValueError, match="has format version 9, this release reads 1"):
        load_export(directory)


def test_a_transformer_of_token_ids_is_exported(tmp_path):
    tokens = InputConfig(kind="tokens", columns=("x",), max_length=6, vocabulary=20)
    config = StudentConfig(kind="transformer", dim=8, layers=1, heads=2, input=tokens)
    student = save_student(tmp_path / "s", build_student(config, (6,), 3), config, "abc", (6,))
    ids = np.random.default_rng(0).integers(0, 20, (300, 6))
    export = load_export(export_student(student, "int8-weights", tmp_path / "e", ids))
    assert export.description["input_dtype"] == "int64"
    expected = load_student(student).logits_of_inputs(ids)
    found = export.logits_of_inputs(ids)
    assert np.sqrt(np.mean((found - expected) ** 2)) <= 0.02 * expected.std()
