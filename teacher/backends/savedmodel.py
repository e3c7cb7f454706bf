"""A teacher that is a TensorFlow SavedModel in this process. TensorFlow is imported when such a teacher is made, not before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt

from distilbeam.quiet import native_lines_dropped
from distilbeam.teacher.backends.local import LocalTeacher, first_line, function_sources, named_inputs, select_output
from distilbeam.teacher.backends.saved_operations import require_harmless
from distilbeam.teacher.config import SavedModelConfig
from distilbeam.teacher.fingerprint import Artefact
from distilbeam.teacher.oom_backoff import Inputs


class SavedModelTeacher(LocalTeacher):
    """Answers with a signature of a SavedModel.

    Args:
      config: the configuration, with paths resolved.

    Raises:
      ValueError: the folder is no SavedModel, or it has no such signature or output.
    """

    def __init__(self, config: SavedModelConfig) -> None:
        folder = Path(config.model)
        settings = config.model_dump_json(include={"input", "output", "signature"}, exclude={"input": {"tokenizer"}})
        files: list[str | Path] = [folder, *config.input.files(), *function_sources(config.input)]
        super().__init__(f"savedmodel:{folder.name}", Artefact(files, settings + config.meaning()), config)
        self.repeats_itself = "asked"
        if not config.trust:
            require_harmless(folder)
        self._config = config
        with native_lines_dropped():
            import tensorflow as tf

        self._tf: Any = tf
        try:
            loaded = tf.saved_model.load(config.model)
        except Exception as e:  # of a damaged one anything
            raise ValueError(f"teacher.model: {config.model} is not a SavedModel: {first_line(e)}") from e
        if config.signature not in loaded.signatures:
            names = ", ".join(loaded.signatures) or "none"
            raise ValueError(f"teacher.signature '{config.signature}' is unknown; {config.model} has {names}")
        self._loaded = loaded  # a signature does not keep its variables alive
        self._model: Any = loaded.signatures[config.signature]
        self._inputs = dict(self._model.structured_input_signature[1])
        select_output(dict.fromkeys(self._model.structured_outputs), config.output)

    def close(self) -> None:
        """Drop the model; see `Teacher`."""
        self._loaded = None
        super().close()

    def _run(self, inputs: Inputs) -> npt.NDArray[Any]:
        model = self._require_open()
        named = named_inputs(inputs, self._inputs)
        tensors = {name: self._tensor(array, self._inputs[name].dtype) for name, array in named.items()}
        output = select_output(model(**tensors), self._config.output)
        wide = output.dtype in (self._tf.float64, self._tf.string)  # text, for the caller to refuse
        answer: npt.NDArray[Any] = (output if wide else self._tf.cast(output, self._tf.float32)).numpy()
        return answer

    def _tensor(self, array: npt.NDArray[Any], dtype: Any) -> Any:
        if array.dtype == object:
            return self._tf.constant(array.tolist(), dtype)
        return self._tf.cast(self._tf.constant(array), dtype)

    def _out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, (MemoryError, self._tf.errors.ResourceExhaustedError))
