"""Exports of a student: files that a server or a device runs without distilbeam.

An export is a directory that appears by one rename: `model.pt2` or `model.onnx`, and `export.json` with what the file
cannot say itself: classes, input, the student that it came from, what it was calibrated on, how far its answers lie
from the student's, and the section `[teacher]` with which distilbeam asks it.

| format         | file                                                                       | needs            |
|----------------|----------------------------------------------------------------------------|------------------|
| `pt2`          | a torch.export program, any batch size                                     |                  |
| `onnx`         | ONNX, float32, any batch size                                              | distilbeam[onnx] |
| `int8`         | ONNX, 8-bit weights and activations; calibrated on examples of the pool    | distilbeam[onnx] |
| `int8-weights` | ONNX, 8-bit weights, float32 arithmetic                                    | distilbeam[onnx] |
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distilbeam.extras import Need, require_extras
from distilbeam.inputs.config import InputConfig
from distilbeam.storage.atomic import committed_directory
from distilbeam.student.checkpoint import Student, load_student
from distilbeam.student.export.quantise import quantise_static, quantise_weights
from distilbeam.student.export.runtimes import open_runner
from distilbeam.student.own_files import with_own_files

FORMATS = ("pt2", "onnx", "int8", "int8-weights")
EXPORT_VERSION = 1
OPSET = 20
CHECKED_ROWS = 64
TOLERANCE = 1e-4
PACKAGES = ("distilbeam", "torch", "onnx", "onnxruntime")


def export_student(
    student: str | Path,
    format: str,  # noqa: A002 - the command's word
    directory: str | Path,
    examples: npt.NDArray[Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Export a student; the directory appears complete or not at all.

    Args:
      student: directory of a trained student.
      format: `pt2`, `onnx`, `int8` or `int8-weights`.
      directory: where; it must not exist, or be empty.
      examples: inputs [rows, *input_shape] that the export is compared with the student on, and that `int8` is calibrated
        on: out of the pool, never the test set. Without them the comparison is made on random numbers.
      origin: where the examples come from, to remember.
      provenance: what else to remember of the student: its soft labels' specification and the like, plain data.

    Returns:
      The directory.

    Raises:
      ValueError: an unknown format, `int8` without examples, or a library that is not installed.
      FileExistsError: the directory already holds something.
      RuntimeError: a float export answers otherwise than the student.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "int8" and (examples is None or not len(examples)):
        raise ValueError("int8 needs examples to calibrate on, got none; give it some of the pool, never the test set")
    if format != "pt2":
        require_extras([Need(f"the format {format}", "onnx", way_round="choose pt2")])
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} already holds something; choose another directory or remove it")
    loaded = load_student(student)
    with committed_directory(directory) as temporary:
        file = temporary / ("model.pt2" if format == "pt2" else "model.onnx")
        _write(loaded, format, file, examples)
        check = _compared(loaded, file, examples, exact=format in ("pt2", "onnx"))
        calibration = None if examples is None else {"rows": len(examples), **(origin or {})}
        inputs = with_own_files(loaded.config.input, temporary)
        description = _description(loaded, inputs, format, file, check, calibration, provenance or {})
        (temporary / "export.json").write_text(json.dumps(description, indent=1) + "\n")
    return directory


def _write(student: Student, format_: str, file: Path, examples: npt.NDArray[Any] | None) -> None:
    program = _program(student)
    if format_ == "pt2":
        torch.export.save(program, file)
        return
    float_file = file if format_ == "onnx" else file.with_name("float.onnx")
    _write_onnx(program, float_file)
    if format_ == "int8":
        assert examples is not None
        quantise_static(float_file, file, examples)
    elif format_ == "int8-weights":
        quantise_weights(float_file, file)
    if float_file != file:
        float_file.unlink()


def _program(student: Student) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("batch", min=1, max=2**20)
    # an example of two rows: torch takes a dimension of one to be one for ever
    return torch.export.export(student.module, (student.zeros(2),), dynamic_shapes=({0: rows},))


def _write_onnx(program: torch.export.ExportedProgram, file: Path) -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter is written in it
    except ImportError as e:
        raise ValueError("ONNX exports need onnx and onnxscript; install distilbeam[onnx]") from e
    with _quiet_exporter():
        exported = torch.onnx.export(
            program, input_names=["input"], output_names=["logits"], opset_version=OPSET, dynamo=True, verbose=False
        )
    assert exported is not None
    model = exported.model_proto
    for holder in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
    ):
        holder.ClearField("metadata_props")  # the exporter's notes on each operation: kilobytes nobody reads
    onnx.save(model, file)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep torch's remarks about its own use of torch, and about libraries that no student needs, from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _compared(student: Student, file: Path, examples: npt.NDArray[Any] | None, exact: bool) -> dict[str, float]:
    """Compare the file's logits with the student's; a float export must have the same."""
    inputs = _checked_inputs(student, examples)
    expected = student.logits_of_inputs(inputs)
    found = open_runner(file)(inputs)
    difference, largest = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    if exact and not difference <= TOLERANCE * max(1.0, largest):
        raise RuntimeError(
            f"the exported {file.suffix} file answers otherwise than the student: its logits differ by up to "
            f"{difference:.3g} where {TOLERANCE * max(1.0, largest):.3g} is allowed; nothing was written"
        )
    agreement = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
    return {
        "rows": len(inputs),
        "largest_difference": difference,
        "largest_logit": largest,
        "same_class": agreement,
    }


def _checked_inputs(student: Student, examples: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    if examples is not None and len(examples):
        return np.array(examples[:CHECKED_ROWS], order="C")  # a copy: Arrow's memory is read-only
    zeros = student.zeros(CHECKED_ROWS).numpy()
    if zeros.dtype != np.float32:
        return zeros  # token ids: only the padding is known to exist
    return np.random.default_rng(0).standard_normal(zeros.shape, np.float32)


def _description(
    student: Student,
    own_input: InputConfig,
    format_: str,
    file: Path,
    check: Mapping[str, float],
    calibration: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    inputs = own_input.model_dump(mode="json", exclude_defaults=True)
    if not own_input.gives_ids:
        inputs.pop("pad_id", None)  # which validation fills in
    return {
        "format_version": EXPORT_VERSION,
        "format": format_,
        "file": file.name,
        "size_bytes": file.stat().st_size,
        "digest": hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest(),
        "classes": list(student.classes),
        "input": inputs,
        "input_shape": list(student.input_shape),
        "input_dtype": str(student.zeros(1).numpy().dtype),
        "student": {
            "fingerprint": student.fingerprint(),
            "config": student.config.model_copy(update={"input": own_input}).model_dump(mode="json"),
            "parameters": student.num_parameters,
            **student.extra,
        },
        "provenance": dict(provenance),
        "examples": calibration,
        "compared_with_student": dict(check),
        "teacher": {"kind": "torch" if file.suffix == ".pt2" else "onnx", "model": file.name, "input": inputs},
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
