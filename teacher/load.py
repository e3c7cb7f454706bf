"""Loading a teacher from its configuration."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilbeam.teacher.config import TeacherConfig, labels_tokens, parse_teacher_config
from distilbeam.teacher.protocol import Teacher


def load_teacher(
    config: TeacherConfig | Mapping[str, Any],
    *,
    base: str | Path | None = None,
    classes: Sequence[str] | None = None,
    form: Mapping[str, Any] | None = None,
) -> Teacher:
    """Load a teacher.

    Args:
      config: the configuration, or the section `[teacher]` of a TOML file as plain data.
      base: folder that relative paths start at; the working directory where it is not given.
      classes: names of the job's classes. A model that knows its outputs by name answers in this order; without them
        every model answers in its own.
      form: how labels of tokens are stored, the fields of `tokens.protocol.TokenForm`: a teacher of tokens then answers each
        block with one row of numbers, like every `Teacher`.

    Returns:
      The teacher; close it when it is no longer needed. One of tokens labels blocks (`TokenTeacher`), all others are `Teacher`s.

    Raises:
      ValueError: a setting is not valid, a file, module or library that it needs is missing, or the model's classes are
        others.
      TeacherUnavailable: a remote teacher cannot be reached.

    Example:
      >>> teacher = load_teacher({"kind": "torch", "model": "teacher.pt2", "input": {"column": "x"}})  # doctest: +SKIP
    """
    parsed = parse_teacher_config(dict(config)) if isinstance(config, Mapping) else config
    teacher: Any = _teacher_class(parsed)(parsed.relative_to(Path(base)) if base is not None else parsed)
    if classes:
        try:
            teacher.arrange(classes)
        except BaseException:
            teacher.close()
            raise
    if form is not None:
        teacher = _answering_blocks(teacher, form)
    loaded: Teacher = teacher
    return loaded


def in_form(teacher: Any, form: Mapping[str, Any]) -> Teacher:
    """Give a loaded teacher of tokens that answers in another form; the weights are the same ones.

    Args:
      teacher: what `load_teacher` returned for a form.
      form: the other form.

    Raises:
      ValueError: it is none that the teacher can have.
    """
    answers, protocol = _modules_of_tokens()
    found: Teacher = answers.BlockAnswers(
        teacher.teacher, protocol.TokenForm(**{**form, "carried": tuple(form["carried"])})
    )
    return found


def _answering_blocks(teacher: Any, form: Mapping[str, Any]) -> Any:
    answers, protocol = _modules_of_tokens()
    try:
        return answers.BlockAnswers(teacher, protocol.TokenForm(**{**form, "carried": tuple(form["carried"])}))
    except BaseException:
        teacher.close()
        raise


def _modules_of_tokens() -> tuple[Any, Any]:
    names = ("block_answers", "protocol")
    answers, protocol = (importlib.import_module(f"distilbeam.teacher.tokens.{name}") for name in names)
    return answers, protocol


# Modules are imported by name when their kind is asked for: each brings a framework of its own.
_TEACHERS = {
    "beam": "backends.beam:BeamTeacher",
    "causal_lm": "tokens.causal_lm:CausalLMTeacher",
    "huggingface": "backends.huggingface:HuggingFaceTeacher",
    "onnx": "backends.onnx:OnnxTeacher",
    "openai": "tokens.served:OpenAITeacher",
    "savedmodel": "backends.savedmodel:SavedModelTeacher",
    "tfserving": "tfserving.client:TfServingTeacher",
    "torch": "backends.torch:TorchTeacher",
}


_OF_TOKENS = {"beam": "tokens.handled:HandlerTeacher"}


def _teacher_class(config: TeacherConfig) -> Any:
    place = _OF_TOKENS.get(config.kind) if labels_tokens(config) else None
    module, _, name = (place or _TEACHERS[config.kind]).partition(":")
    return getattr(importlib.import_module(f"distilbeam.teacher.{module}"), name)
