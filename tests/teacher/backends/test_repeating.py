"""A teacher that answers the same rows differently is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from distilbeam.teacher import TeacherMisfit, load_teacher
from distilbeam.teacher.backends.repeating import require_the_same

X = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
BATCH = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 4)})
INPUT = {"column": "x"}
NETS = """
import torch
class Random(torch.nn.Module):
    def __init__(self, form):
        super().__init__()
        self.layer, self.form, self.seen = torch.nn.Linear(4, 3), form, []
        self.register_buffer("mean", torch.zeros(3))
    def forward(self, x):
        self.seen.append(len(x))
        z = self.layer(x)
        if self.form == "dropout":
            return torch.nn.functional.dropout(z, 0.2)
        if self.form == "noise":
            return z + torch.randn(3)
        if self.form == "batch":
            self.mean += z.mean(0)
            return z - z.mean(0)
        if self.form == "counts":
            self.mean += 1
        return z
"""


@pytest.fixture(autouse=True)
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "random_nets", raising=False)


def factory(form: str) -> Any:
    return load_teacher({"kind": "torch", "model": "random_nets:Random", "arguments": {"form": form}, "input": INPUT})


@pytest.mark.parametrize("form", ["dropout", "noise", "batch"])
def test_a_factory_whose_answers_are_drawn_or_depend_on_the_batch_is_refused(form: str) -> None:
    with pytest.raises(
        TeacherMisfit, match=r"the teacher answers the same rows differently, asked .*call model.eval\(\)"
    ):
        factory(form).logits(BATCH)


def test_a_factory_that_changes_nothing_is_asked_once() -> None:
    teacher = factory("plain")
    teacher.logits(BATCH)
    teacher.logits(BATCH)
    assert teacher._model.seen == [40, 40]


def test_a_factory_that_only_counts_is_asked_again_and_taken() -> None:
    teacher = factory("counts")
    teacher.logits(BATCH)
    teacher.logits(BATCH)
    assert teacher._model.seen == [40, 8, 8, 2, 40]


class Rowwise(torch.nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.layer, self.mode = torch.nn.Linear(4, 3), mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.layer(x)
        if self.mode == "whitened":  # batch normalisation by another name
            return (z - z.mean(0)) / z.std(0)
        return z + torch.rand(1) if self.mode == "random" else z


@pytest.mark.parametrize(("mode", "taken"), [("plain", True), ("whitened", False), ("random", False)])
def test_programs_are_asked_twice(tmp_path: Path, mode: str, taken: bool) -> None:
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(Rowwise(mode).eval(), (torch.zeros(4, 4),), dynamic_shapes=({0: rows},))
    torch.export.save(program, tmp_path / "net.pt2")
    teacher = load_teacher({"kind": "torch", "model": str(tmp_path / "net.pt2"), "input": INPUT})
    if taken:
        assert teacher.logits(BATCH).shape == (40, 3)
    else:
        with pytest.raises(TeacherMisfit, match="answers the same rows differently"):
            teacher.logits(BATCH)


def test_an_onnx_file_in_training_mode_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weights = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["z"]),
            helper.make_node("Dropout", ["z", "ratio", "training"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 3])],
        [
            numpy_helper.from_array(weights, "w"),
            numpy_helper.from_array(np.float32(0.2), "ratio"),
            numpy_helper.from_array(np.array(True), "training"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(TeacherMisfit, match="answers the same rows differently, asked in the same order"):
        load_teacher({"kind": "onnx", "model": str(tmp_path / "net.onnx"), "input": INPUT}).logits(BATCH)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_rounding_is_no_difference(scale: float, offset: float) -> None:
    weights, rng = np.random.default_rng(1).normal(size=(4, 3)), np.random.default_rng(2)

    def forward(x: np.ndarray) -> np.ndarray:
        exact = scale * (x @ weights) + offset
        return (exact * (1 + 1e-6 * rng.normal(size=exact.shape))).astype(np.float32)

    require_the_same(forward, X)


def test_eight_bits_scaled_by_the_batch_are_no_difference() -> None:
    weights = np.random.default_rng(1).normal(size=(4, 3))

    def forward(x: np.ndarray) -> np.ndarray:
        scale = np.abs(x).max() / 127
        return np.asarray(np.round(x / scale) * scale @ weights, np.float32)

    require_the_same(forward, X)


def test_rows_that_cannot_be_answered_prove_nothing() -> None:
    def forward(_: np.ndarray) -> np.ndarray:
        raise RuntimeError("no")

    require_the_same(forward, X)
    require_the_same(lambda x: np.full((len(x), 3), np.nan), X)
    require_the_same(lambda x: np.arange(len(x)), X)
