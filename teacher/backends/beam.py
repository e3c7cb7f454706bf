"""A teacher that is any Apache Beam ModelHandler, so that every handler that Beam has is one.

Only the handler's `load_model`, `run_inference` and `batch_elements_kwargs` are used: batching, retries and metrics are
ours.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from distilbeam.inputs.config import load_object
from distilbeam.teacher.backends.local import LocalTeacher, first_line, function_sources, select_output
from distilbeam.teacher.config import BeamConfig
from distilbeam.teacher.fingerprint import Artefact
from distilbeam.teacher.oom_backoff import Inputs
from distilbeam.teacher.sources import argument_files, source_files


def make_handler(config: BeamConfig) -> ModelHandler[Any, Any, Any]:
    """Call the factory of a handler; its model is not loaded yet.

    Raises:
      ValueError: it does not take the arguments, or returns none.
    """
    factory = load_object(config.handler, "teacher.handler")
    try:
        handler = factory(**config.arguments)
    except TypeError as e:
        raise ValueError(f"teacher.arguments do not suit {config.handler}: {first_line(e)}") from e
    if not isinstance(handler, ModelHandler):
        raise ValueError(f"teacher.handler: {config.handler} must return a ModelHandler, got {type(handler).__name__}")
    return handler


def artefact_of(config: BeamConfig) -> Artefact:
    """Return what identifies a handler's answers: its settings, the code that makes it, and the files that it reads.

    Raises:
      ValueError: a file is missing.
    """
    included = {"handler", "arguments", "version", "examples", "output", "input"}
    settings = json.dumps(config.model_dump(mode="json", include=included), sort_keys=True)
    sources = source_files(config.handler, "teacher.handler")
    files = [*config.files, *sources, *argument_files(config.arguments), *function_sources(config.input)]
    return Artefact(list(dict.fromkeys(files)), settings + config.meaning())


def most_at_once(config: BeamConfig, handler: ModelHandler[Any, Any, Any]) -> int | None:
    """Return how many examples a handler is given at most; None for any number."""
    limits = (config.batch_rows, handler.batch_elements_kwargs().get("max_batch_size"))
    return min((rows for rows in limits if rows is not None), default=None)


class BeamTeacher(LocalTeacher):
    """Answers with a ModelHandler.

    Args:
      config: the configuration, with paths resolved.

    Raises:
      ValueError: the factory does not return a ModelHandler, or a file is missing.
    """

    def __init__(self, config: BeamConfig) -> None:
        self._config = config
        handler, artefact = make_handler(config), artefact_of(config)
        super().__init__(f"beam:{config.handler}", artefact, config, batch_rows=most_at_once(config, handler))
        self._handler: Any = handler
        self._model: Any = handler.load_model()

    def prepared(self, batch: pa.RecordBatch) -> npt.NDArray[Any] | None:
        """Return the input of all rows, unless the handler takes Arrow batches; see `LocalTeacher`."""
        return None if self._config.examples == "batch" else super().prepared(batch)

    def logits(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Answer a batch; see `Teacher`."""
        if self._config.examples == "batch":
            results = list(self._handler.run_inference([batch], self._require_open()))
            return self._order(self._form(np.concatenate([self._answer(result) for result in results])))
        return super().logits(batch)

    def _run(self, inputs: Inputs) -> npt.NDArray[Any]:
        model = self._require_open()
        results = self._handler.run_inference(_EXAMPLES[self._config.examples](inputs), model)
        answers = [self._answer(result) for result in results]
        return np.stack(answers) if answers else np.empty((0, 0), np.float32)

    def _answer(self, result: Any) -> npt.NDArray[Any]:
        output = result.inference if isinstance(result, PredictionResult) else result
        if isinstance(output, Mapping):
            output = select_output(output, self._config.output)
        if hasattr(output, "detach"):  # a torch tensor
            output = output.detach().cpu()
            output = output.float() if output.dtype.itemsize < 4 else output  # NumPy has no bfloat16
        return np.asarray(output)


def _torch_rows(inputs: Any) -> Sequence[Any]:
    torch = importlib.import_module("torch")
    rows: Sequence[Any] = torch.from_numpy(np.require(inputs, requirements="W")).unbind(0)
    return rows


def _tensorflow_rows(inputs: Any) -> Sequence[Any]:
    tensorflow = importlib.import_module("tensorflow")
    rows: Sequence[Any] = tensorflow.unstack(tensorflow.constant(inputs))
    return rows


_EXAMPLES: dict[str, Callable[[Any], Sequence[Any]]] = {
    "numpy": list,
    "torch": _torch_rows,
    "tensorflow": _tensorflow_rows,
}
