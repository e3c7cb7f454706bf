"""8-bit ONNX models through ONNX Runtime's quantiser.

Static: weights and activations are integers, x ~ scale (q - zero). Weights have a scale per output channel, activations
one each, from the least and greatest value seen on calibration examples. Weights keep 7 bits of range: processors
without VNNI add pairs of products of 8-bit numbers in 16 bits, which overflow with all 8. The integer operators of ONNX
Runtime are used rather than pairs of QuantizeLinear and DequantizeLinear: for the convolutional student the file is smaller
and faster.

Weights only: every matrix and convolution is stored in 8 bits and multiplied out in float32; no calibration, a quarter
of the bytes, nearly the same answers, no speed gained.

References:
  Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
  arXiv:1712.05877, section 2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

STATIC_OPERATORS = (
    "Add",
    "AveragePool",
    "Conv",
    "Flatten",
    "Gemm",
    "GlobalAveragePool",
    "MatMul",
    "MaxPool",
    "Relu",
    "Reshape",
)
WEIGHT_OPERATORS = ("Conv", "Gather", "Gemm", "MatMul")
CALIBRATION_ROWS = 64


def quantise_static(model: Path, output: Path, examples: npt.NDArray[Any]) -> None:
    """Quantise weights and activations of an ONNX model.

    Args:
      model: float32 ONNX file with one input.
      output: where the quantised file goes.
      examples: inputs [rows, ...] that show the range of the activations; out of the pool, never the test set.

    Raises:
      ValueError: there is no example, or ONNX Runtime is not installed.
    """
    if not len(examples):
        raise ValueError("int8 needs examples to calibrate on, got none; give it some of the pool")
    library = _library()
    with _quiet():
        prepared = _prepared(library, model, output)
        library.quantize_static(
            prepared,
            output,
            _reader(library, prepared, examples),
            quant_format=library.QuantFormat.QOperator,
            op_types_to_quantize=list(STATIC_OPERATORS),
            per_channel=True,
            reduce_range=True,
            activation_type=library.QuantType.QUInt8,
            weight_type=library.QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    prepared.unlink()


def quantise_weights(model: Path, output: Path) -> None:
    """Store the weights of an ONNX model in 8 bits, one scale per output channel; everything is computed in float32.

    Args:
      model: float32 ONNX file.
      output: where the quantised file goes.

    Raises:
      ValueError: ONNX Runtime is not installed.
    """
    library = _library()
    import onnx
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    class WeightQuantizer(QDQQuantizer):
        """ONNX Runtime's quantiser, told that activations and biases are none of its business."""

        def quantize_activation_tensor(self, tensor_name: str) -> None: ...

        def quantize_output_same_as_input(self, output_name: str, input_name: str, node_name: str) -> None: ...

        def quantize_bias_tensor(self, node_name: str, bias_name: str, input_name: str, weight_name: str, beta: float = 1) -> None: ...  # fmt: skip

    with _quiet():
        prepared = _prepared(library, model, output)
        quantizer = WeightQuantizer(
            onnx.load(prepared),
            per_channel=True,
            reduce_range=False,
            weight_qType=library.QuantType.QInt8,
            activation_qType=library.QuantType.QUInt8,
            tensors_range={},
            nodes_to_quantize=[],
            nodes_to_exclude=[],
            op_types_to_quantize=list(WEIGHT_OPERATORS),
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(output)
    prepared.unlink()


def _library() -> Any:
    try:
        import onnxruntime.quantization as library
    except ImportError as e:
        raise ValueError("8-bit exports need ONNX Runtime; install distilbeam[onnx]") from e
    return library


def _prepared(library: Any, model: Path, output: Path) -> Path:
    """Infer shapes and fold constants, as the quantiser expects."""
    prepared = output.with_suffix(".prepared.onnx")
    try:
        library.shape_inference.quant_pre_process(model, prepared)
    except TypeError:  # ONNX Runtime's symbolic shapes fail on the attention masks of transformers; ONNX's own do not
        library.shape_inference.quant_pre_process(model, prepared, skip_symbolic_shape=True)
    return prepared


def _reader(library: Any, model: Path, examples: npt.NDArray[Any]) -> Any:
    import onnx

    name = onnx.load(model).graph.input[0].name

    class Reader(library.CalibrationDataReader):
        def __init__(self) -> None:
            starts = range(0, len(examples), CALIBRATION_ROWS)
            self.batches = iter([{name: np.ascontiguousarray(examples[i : i + CALIBRATION_ROWS])} for i in starts])

        def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
            return next(self.batches, None)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's remarks on the root logger away: they are about tensors that it leaves alone rightly."""
    root = logging.getLogger()
    silence = _Silence()
    root.addFilter(silence)
    try:
        yield
    finally:
        root.removeFilter(silence)


class _Silence(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR
