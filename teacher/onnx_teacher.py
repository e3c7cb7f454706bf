"""A teacher that is an ONNX model, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distilbeam.teacher.artefact import Artefact
from distilbeam.teacher.config import OnnxConfig
from distilbeam.teacher.halving import Inputs
from distilbeam.teacher.local import LocalTeacher, first_line, named_inputs, select_output

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class OnnxTeacher(LocalTeacher):
    """Answers with an ONNX model.

    Args:
      config: the configuration, with paths resolved.

    Raises:
      ValueError: ONNX Runtime is not installed, or the model, a provider, input or output cannot be used.
    """

    def __init__(self, config: OnnxConfig) -> None:
        try:
            import onnxruntime
        except ImportError as e:
            raise ValueError("a teacher of kind onnx needs ONNX Runtime; install distilbeam[onnx]") from e
        settings = config.model_dump_json(include={"input", "output"}, exclude={"input": {"tokenizer"}})
        artefact = Artefact([*_parts(Path(config.model)), *config.input.files()], settings)
        super().__init__(f"onnx:{Path(config.model).name}", artefact, config.input, config.batch_rows)
        self._config = config
        known = onnxruntime.get_available_providers()
        unknown = [name for name in config.providers if name not in known]
        if unknown:
            raise ValueError(f"teacher.providers must be among {', '.join(known)}, got {unknown[0]}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = config.threads or 0
        try:
            self._model: Any = onnxruntime.InferenceSession(config.model, options, providers=config.providers or known)
        except Exception as e:
            raise ValueError(f"teacher.model: {config.model} cannot be run by ONNX Runtime: {first_line(e)}") from e
        self._inputs = {node.name: node.type for node in self._model.get_inputs()}
        self._outputs = [node.name for node in self._model.get_outputs()]
        select_output(dict.fromkeys(self._outputs), config.output)

    def _run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        session = self._require_open()
        named = named_inputs(inputs, self._inputs)
        feed = {
            name: array.astype(_TYPES.get(self._inputs[name], array.dtype), copy=False) for name, array in named.items()
        }
        outputs = dict(zip(self._outputs, session.run(self._outputs, feed), strict=True))
        answer: npt.NDArray[np.float32] = select_output(outputs, self._config.output).astype(np.float32, copy=False)
        return answer

    def _out_of_memory(self, error: Exception) -> bool:
        text = str(error)
        return isinstance(error, MemoryError) or "Failed to allocate memory" in text or "out of memory" in text.lower()


def _parts(model: Path) -> list[Path]:
    """List the model and the files beside it that hold its weights: `model.onnx.data`, `model.onnx_data` and the like."""
    beside = sorted(p for p in model.parent.glob(f"{model.name}[._]*") if p.is_file())
    return [model, *beside]
