"""Exports of a student: files that a server or a device runs without distilbeam.

An export is a directory that appears by one rename, and nothing else is needed to use it:

* `model.pt2` or `model.onnx`: the network behind as much of its preprocessing as a graph holds (`preprocessing`), with classes,
  input and versions in the file's own metadata (`metadata`);
* `export.json`: what callers make of an example before, the student that it came from, what it was calibrated on, how far its
  answers lie from the student's, and the section `[teacher]` with which distilbeam asks it;
* `tokenizer.json` of a student that has one; beside the `onnx` file of a text classifier of transformers, which takes `input_ids` of
  any length, also `config.json` and the tokenizer's settings, as tools for such folders expect them;
* `reader.py`: makes the input and predicts, with numpy and the file's runtime alone;
* `README.md`: the model card.

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
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
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
from distilbeam.student.export.metadata import EXTRA_FILE, annotate_onnx
from distilbeam.student.export.preprocessing import GraphInput, graph_input
from distilbeam.student.export.quantise import quantise_static, quantise_weights
from distilbeam.student.export.runtimes import open_runner
from distilbeam.student.model_card import CARD, Card
from distilbeam.student.networks.huggingface import CONFIG
from distilbeam.student.networks.huggingface_files import TOKENIZER_FILES
from distilbeam.student.own_files import with_own_files

FORMATS = ("pt2", "onnx", "int8", "int8-weights")
EXPORT_VERSION = 1
OPSET = 20
CHECKED_ROWS = 64
TOLERANCE = 1e-4
READER = Path(__file__).with_name("reader.py")
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
      examples: the student's inputs [rows, *input_shape] that the export is compared with it on, and that `int8` is calibrated
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
    graph = graph_input(loaded, np.float32 if format == "pt2" else np.uint8)
    raw = None if examples is None else graph.raw(examples, loaded.config.input)
    with committed_directory(directory) as temporary:
        file = temporary / ("model.pt2" if format == "pt2" else "model.onnx")
        inputs = with_own_files(graph.config, temporary)
        if format != "onnx":
            graph = replace(graph, lengths=False)  # the quantiser must know how long a text is
        graph, program = _program(graph)
        about = _about(loaded, graph, inputs)
        _write(graph, program, format, file, raw, about)
        if graph.lengths:
            for name in (CONFIG, *TOKENIZER_FILES):
                if (Path(student) / name).is_file():
                    shutil.copyfile(Path(student) / name, temporary / name)
        check = _compared(loaded, graph, file, raw, exact=format in ("pt2", "onnx"))
        calibration = None if examples is None else {"rows": len(examples), **(origin or {})}
        description = _description(loaded, graph, inputs, about, format, file, check, calibration, provenance or {})
        shutil.copyfile(READER, temporary / READER.name)
        (temporary / "export.json").write_text(json.dumps(description, indent=1) + "\n")
        (temporary / CARD).write_text(card_of(loaded, description, provenance or {}).text())
    return directory


def _write(
    graph: GraphInput,
    program: torch.export.ExportedProgram,
    format_: str,
    file: Path,
    raw: npt.NDArray[Any] | None,
    about: Mapping[str, Any],
) -> None:
    if format_ == "pt2":
        torch.export.save(program, file, extra_files={EXTRA_FILE: json.dumps(dict(about))})
        return
    float_file = file if format_ == "onnx" else file.with_name("float.onnx")
    _write_onnx(program, float_file, name_of_input(graph))
    if format_ == "int8":
        assert raw is not None
        quantise_static(float_file, file, raw)
    elif format_ == "int8-weights":
        quantise_weights(float_file, file)
    if float_file != file:
        float_file.unlink()
    annotate_onnx(file, about, graph.dimensions)


def name_of_input(graph: GraphInput) -> str:
    """Name an ONNX file's input as tools for the folders of transformers look for it, where it is that of such a model."""
    return "input_ids" if graph.lengths else "input"


def _program(graph: GraphInput) -> tuple[GraphInput, torch.export.ExportedProgram]:
    """Trace a graph; of a network that is made for one length alone, the graph of that length."""
    if graph.lengths:
        try:
            return graph, _traced(graph)
        except Exception:  # noqa: BLE001 - torch says in many ways that a size is built into a network
            graph = replace(graph, lengths=False)
    return graph, _traced(graph)


def _traced(graph: GraphInput) -> torch.export.ExportedProgram:
    sizes = {place: torch.export.Dim(name, min=1, max=graph.longest[name]) for place, name in graph.dimensions.items()}
    # an example of two rows: torch takes a dimension of one to be one for ever
    return torch.export.export(graph.module.eval(), (graph.zeros(2),), dynamic_shapes=(sizes,))


def _write_onnx(program: torch.export.ExportedProgram, file: Path, name: str = "input") -> None:
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter is written in it
    except ImportError as e:
        raise ValueError("ONNX exports need onnx and onnxscript; install distilbeam[onnx]") from e
    with _quiet_exporter():
        exported = torch.onnx.export(
            program, input_names=[name], output_names=["logits"], opset_version=OPSET, dynamo=True, verbose=False
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


def _compared(
    student: Student, graph: GraphInput, file: Path, raw: npt.NDArray[Any] | None, exact: bool
) -> dict[str, float]:
    """Compare the file's logits with the student's; a float export must have the same."""
    given = _checked_inputs(graph, raw)
    expected = student.logits_of_inputs(graph.inputs_of(given, student.config.input))
    found = open_runner(file)(given)
    difference, largest = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    if exact and not difference <= TOLERANCE * max(1.0, largest):
        raise RuntimeError(
            f"the exported {file.suffix} file answers otherwise than the student: its logits differ by up to "
            f"{difference:.3g} where {TOLERANCE * max(1.0, largest):.3g} is allowed; nothing was written"
        )
    agreement = float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
    return {
        "rows": len(given),
        "largest_difference": difference,
        "largest_logit": largest,
        "same_class": agreement,
    }


def _checked_inputs(graph: GraphInput, raw: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    if raw is not None and len(raw):
        return raw[:CHECKED_ROWS]
    zeros = graph.zeros(CHECKED_ROWS).numpy()
    rng = np.random.default_rng(0)
    if graph.config.kind == "image":
        return rng.integers(0, 256, zeros.shape).astype(zeros.dtype)
    if zeros.dtype != np.float32:
        return zeros  # token ids: only the padding is known to exist
    return rng.standard_normal(zeros.shape, np.float32)


def card_of(
    student: Student, description: Mapping[str, Any] | None = None, provenance: Mapping[str, Any] | None = None
) -> Card:
    """Begin the model card of a student or an export of it.

    Args:
      student: the student.
      description: `export.json`; None for the student itself.
      provenance: what it was made from, as `export_student` is told.
    """
    spec = ((provenance or {}).get("soft_labels") or {}).get("spec")
    facts = {"teacher": f"{spec['teacher']}, labels at temperature {spec['temperature']:.3g}"} if spec else {}
    return Card(
        student.config,
        student.classes,
        student.num_parameters,
        student.extra,
        student.fingerprint(),
        description,
        facts,
    )


def _about(student: Student, graph: GraphInput, own_input: InputConfig) -> dict[str, Any]:
    """Say what the file is, for its own metadata and for what lies beside it."""
    inputs = own_input.model_dump(mode="json", exclude_defaults=True)
    if not own_input.gives_ids:
        inputs.pop("pad_id", None)  # which validation fills in
    return {
        "classes": list(student.classes),
        "input": inputs,
        "input_dtype": graph.dtype.name,
        "graph": list(graph.does),
        "dimensions": list(graph.dimensions.values()),
        "student": student.fingerprint(),
        "parameters": student.num_parameters,
        "weights_bytes": student.size_bytes,
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _description(
    student: Student,
    graph: GraphInput,
    own_input: InputConfig,
    about: Mapping[str, Any],
    format_: str,
    file: Path,
    check: Mapping[str, float],
    calibration: Mapping[str, Any] | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    config = student.config.model_copy(
        update={"input": student.config.input.model_copy(update={"tokenizer": own_input.tokenizer})}
    )
    return {
        "format_version": EXPORT_VERSION,
        "format": format_,
        "file": file.name,
        "size_bytes": file.stat().st_size,
        "digest": hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest(),
        **{name: about[name] for name in ("classes", "input", "input_dtype", "graph", "dimensions", "packages")},
        "input_shape": list(graph.shape),
        "student": {
            "fingerprint": student.fingerprint(),
            "config": config.model_dump(mode="json"),
            "parameters": student.num_parameters,
            "weights_bytes": student.size_bytes,
            **student.extra,
        },
        "provenance": dict(provenance),
        "examples": calibration,
        "compared_with_student": dict(check),
        "teacher": {
            "kind": "torch" if file.suffix == ".pt2" else "onnx",
            "model": file.name,
            "input": about["input"],
            "classes": list(student.classes),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
