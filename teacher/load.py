"""From a configuration to a teacher."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distilbeam.teacher.config import TeacherConfig, parse_teacher_config
from distilbeam.teacher.protocol import Teacher


def load_teacher(config: TeacherConfig | Mapping[str, Any], *, base: str | Path | None = None) -> Teacher:
    """Load a teacher.

    Args:
      config: the configuration, or the section `[teacher]` of a TOML file as plain data.
      base: folder that relative paths start at; the working directory where it is not given.

    Returns:
      The teacher; close it when it is no longer needed.

    Raises:
      ValueError: a setting is not valid, or a file, module or library that it needs is missing.
      TeacherUnavailable: a remote teacher cannot be reached.

    Example:
      >>> teacher = load_teacher({"kind": "torch", "model": "teacher.pt2", "input": {"column": "x"}})  # doctest: +SKIP
    """
    parsed = parse_teacher_config(dict(config)) if isinstance(config, Mapping) else config
    teacher: Teacher = _teacher_class(parsed.kind)(parsed.relative_to(Path(base)) if base is not None else parsed)
    return teacher


# Modules are imported by name when their kind is asked for: each brings a framework of its own.
_TEACHERS = {
    "beam": "beam_teacher:BeamTeacher",
    "huggingface": "huggingface_teacher:HuggingFaceTeacher",
    "onnx": "onnx_teacher:OnnxTeacher",
    "savedmodel": "savedmodel_teacher:SavedModelTeacher",
    "tfserving": "tfserving.client:TfServingTeacher",
    "torch": "torch_teacher:TorchTeacher",
}


def _teacher_class(kind: str) -> Any:
    module, _, name = _TEACHERS[kind].partition(":")
    return getattr(importlib.import_module(f"distilbeam.teacher.{module}"), name)
