"""8-bit exports hold the numbers of `quantize_rowwise`: what a student was trained with in int8 is what its file says."""

from __future__ import annotations

import pytest
import torch

from distilbeam.kernels import quantize_rowwise

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def test_weights_of_an_int8_file_are_the_rows_in_eight_bits(tmp_path, rng):
    from onnx import TensorProto, helper, numpy_helper

    from distilbeam.student.export.quantise import quantise_weights

    weight = torch.randn(24, 50, generator=rng) * torch.exp(torch.randn(24, 1, generator=rng))
    nodes = [helper.make_node("Gemm", ["x", "weight"], ["y"], transB=1)]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]) for name, size in (("x", 50), ("y", 24))
    ]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], [numpy_helper.from_array(weight.numpy(), "weight")])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "layer.onnx"
    )
    quantise_weights(tmp_path / "layer.onnx", tmp_path / "narrow.onnx")
    held = {x.name: numpy_helper.to_array(x) for x in onnx.load(tmp_path / "narrow.onnx").graph.initializer}
    rows = quantize_rowwise(weight, torch.int8)
    assert torch.equal(torch.tensor(held["weight_quantized"]), rows.values)
    # ONNX Runtime divides by 127 where we multiply by its reciprocal
    torch.testing.assert_close(torch.tensor(held["weight_scale"]), rows.scale[:, 0], rtol=2.4e-7, atol=0)
    assert not held["weight_zero_point"].any()
