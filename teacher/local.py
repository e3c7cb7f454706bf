"""What teachers in this process share: files that are watched, inputs, batches that fit into memory, a choice of output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.teacher.artefact import Artefact
from distilbeam.teacher.halving import Halving, Inputs
from distilbeam.teacher.inputs.tensors import TensorInput
from distilbeam.teacher.preprocess import InputConfig, make_input
from distilbeam.teacher.protocol import NotPickled


class LocalTeacher(NotPickled, ABC):
    """A model in this process; a subclass says how it is run.

    Args:
      name: first part of the fingerprint.
      artefact: the files and settings that decide the answers.
      inputs: what the model reads.
      batch_rows: most rows at a time; None for as many as are asked.
    """

    parallel = 1

    def __init__(self, name: str, artefact: Artefact, inputs: InputConfig, batch_rows: int | None) -> None:
        self._name, self._artefact = name, artefact
        self._input = make_input(inputs)
        self._forward = Halving(self._run, self._out_of_memory, self._release, batch_rows)

    def fingerprint(self) -> str:
        """Identify the answers by the files and settings; see `Teacher`."""
        return f"{self._name}:{self._artefact.digest()}"

    def logits(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Answer a batch; see `Teacher`."""
        return self._forward(self._input(batch))

    def prepared(self, batch: pa.RecordBatch) -> npt.NDArray[Any] | None:
        """Return the input of all rows where it takes little more memory than they do, for `answer`; else None.

        Raises:
          InputError: see `make_input`.
        """
        return self._input(batch) if isinstance(self._input, TensorInput) else None

    def answer(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Answer rows of what `prepared` returned."""
        return self._forward(inputs)

    def close(self) -> None:
        """Drop the model; see `Teacher`."""
        self._model: Any = None
        self._release()

    def set_batch_rows(self, rows: int) -> None:
        """Set the most rows at a time."""
        self._forward.rows = rows

    @abstractmethod
    def _run(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        """Run the model on n rows of input and return float32 [n, C]."""

    def _out_of_memory(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)

    def _release(self) -> None:
        """Free what a failed attempt holds."""

    def _require_open(self) -> Any:
        if self._model is None:
            raise RuntimeError("the teacher was closed; load it again")
        return self._model


def select_output(outputs: Any, output: str | int | None) -> Any:
    """Find the logits among a model's outputs.

    Args:
      outputs: a tensor, a sequence or a mapping of them.
      output: name or position; without it the only output, the one called `logits`, or the first of a sequence.

    Returns:
      The tensor.

    Raises:
      ValueError: there is no such output.
    """
    if hasattr(outputs, "shape"):  # a tensor, as nearly always: the question is asked at every call of a model
        return outputs
    if isinstance(outputs, Mapping):
        names = list(outputs)
        name = output if output is not None else names[0] if len(names) == 1 else "logits"
        if name not in outputs:
            raise ValueError(
                f"teacher.output must be one of the model's outputs {', '.join(map(str, names))}, got {name!r}"
            )
        return outputs[name]
    if isinstance(outputs, (tuple, list)):
        position = 0 if output is None else output
        if not isinstance(position, int) or not -len(outputs) <= position < len(outputs):
            raise ValueError(f"teacher.output must be a position below {len(outputs)}, got {output!r}")
        return outputs[position]
    return outputs


def named_inputs(inputs: Inputs, names: Collection[str]) -> Mapping[str, npt.NDArray[Any]]:
    """Give each array of input its name.

    Args:
      inputs: an array for a model of one input, or a mapping.
      names: names of the model's inputs.

    Returns:
      One array for each name.

    Raises:
      ValueError: the mapping has other names, or there is one array for several inputs.
    """
    if not isinstance(inputs, Mapping):
        if len(names) == 1:
            return {next(iter(names)): inputs}
        found = "one array"
    elif set(inputs) == set(names):
        return inputs
    else:
        found = ", ".join(sorted(inputs))
    raise ValueError(
        f"the model has the inputs {', '.join(sorted(names))}, got {found}; several inputs need an input of kind function "
        "that returns a mapping of their names"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
