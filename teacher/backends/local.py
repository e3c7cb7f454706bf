"""The common part of teachers in this process: watched files, inputs, batches that fit into memory, the choice of an output."""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.inputs.tensors import TensorInput
from distilbeam.teacher.answers import AnswerForm
from distilbeam.teacher.backends.repeating import require_the_same
from distilbeam.teacher.class_order import class_order
from distilbeam.teacher.fingerprint import Artefact
from distilbeam.teacher.oom_backoff import Halving, Inputs, count_rows
from distilbeam.teacher.protocol import NotPickled
from distilbeam.teacher.sources import source_files


class OutputOrder:
    """Puts a model's outputs in the order of the job's classes.

    Args:
      own: names of the outputs; empty where they have none.
      whose: what answered with them, for the message.
    """

    def __init__(self, own: Sequence[str], whose: str) -> None:
        self.own, self._whose = tuple(own), whose
        self._order: list[int] | None = None

    def arrange(self, classes: Sequence[str]) -> None:
        """Find the order; see `class_order`."""
        if self.own:
            self._order = class_order(self.own, classes, self._whose)

    def __call__(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the columns in the order of the job's classes; another number of them is for the caller to refuse."""
        if self._order is None or logits.ndim != 2 or logits.shape[1] != len(self._order):
            return logits
        return np.ascontiguousarray(logits[:, self._order])

    def meaning(self) -> str:
        """Return what of the order decides the labels, for the fingerprint; nothing where it is the model's own."""
        if self._order is None:
            return ""
        return ":order-" + hashlib.blake2b(repr(self._order).encode(), digest_size=4).hexdigest()


class LocalTeacher(NotPickled, ABC):
    """A model in this process; a subclass says how it is run.

    Args:
      name: first part of the fingerprint.
      artefact: the files and settings that decide the answers.
      config: the configuration.
      inputs: what the model reads, where it is not `config.input`.
      batch_rows: most rows at a time, where it is not `config.batch_rows`; None for as many as are asked.
    """

    parallel = 1
    repeats_itself = "unsuspected"  # "asked": a file decides how the model computes, so that it is asked twice

    def __init__(
        self,
        name: str,
        artefact: Artefact,
        config: Any,
        inputs: InputConfig | None = None,
        batch_rows: int | None = None,
    ) -> None:
        self._name, self._artefact = name, artefact
        self._input = make_input(inputs or config.input)
        self._forward = Halving(self._run, self._out_of_memory, self._release, batch_rows or config.batch_rows)
        self._form = AnswerForm(config.answers)
        self._order = OutputOrder(config.classes, "teacher.classes")
        self._unprobed, self._lock = True, threading.Lock()

    def fingerprint(self) -> str:
        """Identify the answers by the files and settings; see `Teacher`."""
        return f"{self._name}:{self._artefact.digest()}{self._order.meaning()}"

    def logits(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Answer a batch; see `Teacher`."""
        return self._answered(self._input(batch))

    def prepared(self, batch: pa.RecordBatch) -> npt.NDArray[Any] | None:
        """Return the input of all rows where it takes little more memory than they do, for `answer`; else None.

        Raises:
          InputError: see `make_input`.
        """
        return self._input(batch) if isinstance(self._input, TensorInput) else None

    def answer(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Answer rows of what `prepared` returned."""
        return self._answered(inputs)

    def arrange(self, classes: Sequence[str]) -> None:
        """Answer in the order of the job's classes from now on, where the model knows its outputs by name.

        Args:
          classes: names of the classes.

        Raises:
          ValueError: the names or their number differ.
        """
        self._order.arrange(classes)

    def _names_itself(self, own: Sequence[str], whose: str) -> None:
        """Take the names that the model has for its outputs, unless the configuration has some."""
        if not self._order.own:
            self._order = OutputOrder(own, whose)

    def _answered(self, inputs: Inputs) -> npt.NDArray[np.float32]:
        answers = self._first(inputs) if self._unprobed and count_rows(inputs) else self._forward(inputs)
        return self._order(self._form(answers))

    def _first(self, inputs: Inputs) -> npt.NDArray[Any]:
        """Answer the first batch, and find out whether the model says the same twice."""
        with self._lock:
            before = self._state()
            answers = self._forward(inputs)
            if self._unprobed:
                if self.repeats_itself == "asked" or self._state() != before:
                    require_the_same(self._forward, inputs)
                self._unprobed = False
        return answers

    def _state(self) -> object:
        """Describe what a forward pass leaves as it is, unless the model draws random numbers or changes itself."""
        return None

    def close(self) -> None:
        """Drop the model; see `Teacher`."""
        self._model: Any = None
        self._release()

    def set_batch_rows(self, rows: int) -> None:
        """Set the most rows at a time."""
        self._forward.rows = rows

    @abstractmethod
    def _run(self, inputs: Inputs) -> npt.NDArray[Any]:
        """Run the model on n rows of input and return what it answers, floating [n, C]."""

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


def function_sources(inputs: InputConfig) -> list[str]:
    """List the source files of an input of kind function; none for the others."""
    return source_files(inputs.function, "teacher.input.function") if inputs.function else []


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
