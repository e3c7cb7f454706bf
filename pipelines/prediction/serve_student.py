"""Serving a student: the server of teachers, which answers with the names of the classes too."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.config import InputError
from distilbeam.pipelines.prediction.opened_model import Model
from distilbeam.teacher.tfserving.serve import ModelServer, serve_until_stopped
from distilbeam.teacher.tfserving.serve_options import ServeOptions


class AskedModel:
    """A student as the server asks it: see `teacher.protocol.Teacher`."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def fingerprint(self) -> str:
        """Identify the answers."""
        return self._model.fingerprint()

    def logits(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Answer a batch.

        Raises:
          InputError: a row has no input that the student can use.
        """
        inputs = self._model.inputs(batch)
        if inputs.shape[1:] != self._model.input_shape:
            raise InputError(
                f"an example must have the shape {list(self._model.input_shape)} that the student was trained on, got "
                f"{list(inputs.shape[1:])}"
            )
        return self._model.logits_of_inputs(inputs)

    def close(self) -> None:
        """Do nothing: a student holds no connections."""


class StudentServer(ModelServer):
    """A running server of a student, an export or a Hugging Face classifier; see `ModelServer`.

    Args:
      model: what `open_model` gave.
      port: port to listen on; 0 for any free one.
      options: how it is served.

    Raises:
      ValueError: the port is taken.
    """

    def __init__(self, model: Model, port: int = 0, options: ServeOptions | None = None) -> None:
        options = options or ServeOptions(name="student")
        super().__init__(AskedModel(model), model.input, port, options, model.classes)


def serve_student(
    model: Model, port: int, options: ServeOptions, ready: Callable[[ModelServer], None] | None = None
) -> None:
    """Serve a student until the process gets SIGINT or SIGTERM; `ready` is called once with the running server."""
    serve_until_stopped(lambda: StudentServer(model, port, options), ready)
