"""An export of a student, loaded again: it answers as a student does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.student.checkpoint import DESCRIPTION, Student, load_student
from distilbeam.student.export.export import EXPORT_VERSION
from distilbeam.student.export.runtimes import open_runner
from distilbeam.student.other_folders import held_instead
from distilbeam.student.own_files import found_in
from distilbeam.student.predictions import Predictor
from distilbeam.student.trust import code_of_input, require_trusted

ROWS = 256


class ExportedStudent(Predictor):
    """An export that answers batches; `predict` gives classes, `logits` what they are made of.

    Attributes:
      description: the contents of `export.json`.
      classes: names of the classes in the order of the logits.
      input: which columns are read, and how.
      columns: their names.
      input_shape: shape of one example's input.
      num_parameters: parameters of the student that it came from.
      size_bytes: size of the file.
    """

    def __init__(self, directory: Path, description: dict[str, Any], threads: int | None = None) -> None:
        self.description = description
        self.classes: tuple[str, ...] = tuple(description["classes"])
        self.input = found_in(InputConfig.model_validate(description["input"]), directory)
        self.columns = self.input.columns
        self.input_shape: tuple[int, ...] = tuple(description["input_shape"])
        self.num_parameters: int = description["student"]["parameters"]
        self.size_bytes: int = description["size_bytes"]
        self._make_input = make_input(self.input)
        self._run = open_runner(directory / description["file"], threads)

    def logits(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        """Compute the logits of a batch with the columns of the input, float32 [rows, C]."""
        return self.logits_of_inputs(self._make_input(batch))

    def inputs(self, batch: pa.RecordBatch) -> Any:
        """Make the input of a batch."""
        return self._make_input(batch)

    def fingerprint(self) -> str:
        """Identify the export by its file."""
        digest: str = self.description["digest"]
        return digest

    def logits_of_inputs(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Compute the logits of inputs that are arrays already, [rows, *input_shape]."""
        if inputs.shape[1:] != self.input_shape:
            raise ValueError(
                f"inputs must have the shape {list(self.input_shape)} that the student was trained on, "
                f"got {list(inputs.shape[1:])}"
            )
        dtype = np.dtype(self.description["input_dtype"])
        if dtype.kind in "iu" and inputs.dtype.kind == "f":
            inputs = np.rint(inputs)  # pixels of images deeper than 8 bits
        parts = [self._run(np.array(inputs[i : i + ROWS], dtype)) for i in range(0, len(inputs), ROWS)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.classes)), np.float32)


def load_export(directory: str | Path, threads: int | None = None, trust: Sequence[str] = ()) -> ExportedStudent:
    """Load an export.

    Args:
      directory: written by `export_student`.
      threads: most threads of one operation; the runtime's own choice without it.
      trust: modules, or `module:name`, whose code the export may call to make its input.

    Returns:
      The export.

    Raises:
      ValueError: the directory holds no export, one of a newer format, or a file that is not the one that was exported;
        or it names code that nobody trusts (see `student.trust`).
    """
    directory = Path(directory)
    try:
        description = json.loads((directory / "export.json").read_text())
    except (FileNotFoundError, NotADirectoryError) as e:
        raise ValueError(f"{directory} holds no export: export.json is missing{held_instead(directory)}") from e
    except ValueError as e:
        raise ValueError(f"{directory / 'export.json'} is not valid JSON: {e}") from e
    version = description.get("format_version") if isinstance(description, dict) else None
    if version != EXPORT_VERSION:
        raise ValueError(f"{directory} has format version {version}, this release reads {EXPORT_VERSION}")
    try:
        return _opened(directory, description, threads, trust)
    except (AttributeError, KeyError, TypeError, ValidationError) as e:
        why = "it has no " + str(e) if isinstance(e, KeyError) else str(e).splitlines()[0]
        raise ValueError(
            f"{directory / 'export.json'} does not describe an export: {why}; export the student again"
        ) from e


def load_model(directory: Path) -> Student | ExportedStudent:
    """Load a student or an export of one.

    Raises:
      ValueError: the directory holds neither.
    """
    if (directory / DESCRIPTION).exists():
        return load_student(directory)
    if (directory / "export.json").exists():
        return load_export(directory)
    raise ValueError(
        f"{directory} must hold a student (student.json) or an export (export.json), such as run/students/round=003"
        f"{held_instead(directory)}"
    )


def input_of(model: Predictor) -> InputConfig:
    """Return which columns a model reads, and how."""
    return model.input


def _opened(directory: Path, description: dict[str, Any], threads: int | None, trust: Sequence[str]) -> ExportedStudent:
    file = directory / description["file"]
    if Path(description["file"]).name != description["file"]:
        raise ValueError(
            f"{directory / 'export.json'} names the file {description['file']!r}, which must lie beside it"
        )
    if hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest() != description["digest"]:
        raise ValueError(f"{file} is not the file that was exported: its digest differs; export the student again")
    inputs = InputConfig.model_validate(description["input"])
    require_trusted(code_of_input(inputs), directory / "export.json", trust)
    return ExportedStudent(directory, description, threads)
