"""A teacher that is an ONNX model, run by ONNX Runtime."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distilbeam.inputs.converting import converted
from distilbeam.teacher.backends.local import LocalTeacher, first_line, function_sources, named_inputs, select_output
from distilbeam.teacher.backends.onnx_files import class_labels, weight_files
from distilbeam.teacher.config import OnnxConfig
from distilbeam.teacher.fingerprint import Artefact
from distilbeam.teacher.oom_backoff import Inputs

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

    The answers are its output `teacher.output`, its only one, that which is called `logits`, or the only one that holds a
    number for each class.

    Args:
      config: the configuration, with paths resolved.

    Raises:
      ValueError: ONNX Runtime is not installed, or the model, a provider, input or output cannot be used.
    """

    repeats_itself = "asked"

    def __init__(self, config: OnnxConfig) -> None:
        try:
            import onnxruntime
        except ImportError as e:
            raise ValueError("a teacher of kind onnx needs ONNX Runtime; install distilbeam[onnx]") from e
        settings = config.model_dump_json(include={"input", "output"}, exclude={"input": {"tokenizer"}})
        path = Path(config.model)
        if path.exists() and not path.is_file():
            raise ValueError(f"teacher.model: {path} is a folder; name the .onnx file in it")
        beside = _beside(path)
        elsewhere = [file for file in (weight_files(path) if path.exists() else []) if file not in beside]
        files: list[str | Path] = [path, *beside, *config.input.files(), *elsewhere, *function_sources(config.input)]
        super().__init__(f"onnx:{path.name}", Artefact(files, settings + config.meaning()), config)
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
        outputs = {node.name: node for node in self._model.get_outputs()}
        self._output = config.output or _output_of_classes(outputs)
        select_output(dict.fromkeys(outputs), self._output)
        self._labels = class_labels(path)

    def arrange(self, classes: Sequence[str]) -> None:
        """Answer in the order of the job's classes, where the file records names; see `LocalTeacher`."""
        if len(classes) in self._labels:
            self._names_itself(self._labels[len(classes)], "the classifier's classlabels in the ONNX file")
        super().arrange(classes)

    def _run(self, inputs: Inputs) -> npt.NDArray[Any]:
        session = self._require_open()
        named = named_inputs(inputs, self._inputs)
        feed = {
            name: converted(array, np.dtype(_TYPES.get(self._inputs[name], array.dtype)))
            for name, array in named.items()
        }
        (answer,) = session.run([self._output], feed)
        if isinstance(answer, list):  # a sequence of maps, as converters of scikit-learn's classifiers write them
            return _from_maps(answer, self._labels)
        if answer.dtype.kind == "f" and answer.dtype.itemsize < 4:
            return np.asarray(answer, np.float32)
        return np.asarray(answer)

    def _out_of_memory(self, error: Exception) -> bool:
        text = str(error)
        return isinstance(error, MemoryError) or "Failed to allocate memory" in text or "out of memory" in text.lower()


def _beside(model: Path) -> list[Path]:
    """List the files beside a model that are named after it: `model.onnx.data`, `model.onnx_data` and the like."""
    return sorted(p for p in model.parent.glob(f"{glob.escape(model.name)}[._]*") if p.is_file())


def _output_of_classes(outputs: Mapping[str, Any]) -> str | None:
    """Choose the output with a number for each class, where a classifier has the class itself beside it; else None."""
    if len(outputs) == 1 or "logits" in outputs:
        return "logits" if "logits" in outputs else next(iter(outputs))
    good = [name for name, node in outputs.items() if _may_hold_classes(node)]
    return good[0] if len(good) == 1 else None


def _may_hold_classes(node: Any) -> bool:
    if node.type.startswith("seq(map("):
        return True
    return node.type in ("tensor(float)", "tensor(double)", "tensor(float16)") and len(node.shape) == 2


def _from_maps(rows: list[Any], labels: Mapping[int, Sequence[str]]) -> npt.NDArray[Any]:
    """Put maps from classes to numbers into rows, in the order that the file records; the runtime sorts them."""
    if not rows or not isinstance(rows[0], Mapping):
        raise ValueError(
            "the model's output is a sequence, not a row of numbers for each example; choose another in teacher.output"
        )
    places = {str(name): name for name in rows[0]}
    recorded = labels.get(len(places), ())
    names = [places[name] for name in recorded] if set(recorded) == set(places) else list(places.values())
    return np.array([[row[name] for name in names] for row in rows], np.float32)
