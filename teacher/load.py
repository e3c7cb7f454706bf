"""From a configuration to a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    return _LOADERS[parsed.kind](parsed.relative_to(Path(base)) if base is not None else parsed)


def _torch(config: Any) -> Teacher:
    from distilbeam.teacher.torch_teacher import TorchTeacher

    return TorchTeacher(config)


def _tfserving(config: Any) -> Teacher:
    from distilbeam.teacher.tfserving.client import TfServingTeacher

    return TfServingTeacher(config)


_LOADERS: dict[str, Callable[[Any], Teacher]] = {"tfserving": _tfserving, "torch": _torch}
