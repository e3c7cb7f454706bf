"""Teachers and students inside workers: loaded once per process, whatever the runner does with its threads.

Some runners call `setup` once per partition or per thread, so models are kept in a module-level cache instead; the key is
the configuration as text, and a lock keeps two threads from loading the same model twice.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distilbeam.student.checkpoint import Student, load_student
from distilbeam.teacher.config import TeacherConfig
from distilbeam.teacher.load import in_form, load_teacher
from distilbeam.teacher.protocol import Teacher

if TYPE_CHECKING:
    from distilbeam.student.language.folder import LanguageModel

_lock = threading.Lock()
_teachers: dict[str, Teacher] = {}
_students: dict[str, Student] = {}
_language_models: dict[tuple[str, str], LanguageModel] = {}


def teacher_text(
    config: TeacherConfig, classes: Sequence[str] | None = None, form: Mapping[str, Any] | None = None
) -> str:
    """Describe a teacher as text that travels to workers, which start in another folder: its paths must be absolute.

    Args:
      config: the configuration.
      classes: names of the job's classes, in whose order it answers; see `load_teacher`.
      form: how labels of tokens are stored, the fields of `TokenForm`; None for labels of examples.
    """
    description: dict[str, Any] = {"config": config.model_dump(mode="json"), "classes": list(classes or ())}
    if form is not None:
        description["tokens"] = dict(form)
    return json.dumps(description, sort_keys=True)


def cached_teacher(text: str) -> Teacher:
    """Return this process's copy of the teacher that `teacher_text` describes."""
    with _lock:
        if text not in _teachers:
            _teachers[text] = _loaded(json.loads(text))
        return _teachers[text]


def _loaded(description: Mapping[str, Any]) -> Teacher:
    """Load a teacher; one of tokens that is here already answers in a further form, for its weights may be all that fits."""
    config, classes, form = description["config"], description["classes"], description.get("tokens")
    if form is not None:
        for text, teacher in _teachers.items():
            if json.loads(text)["config"] == config:
                return in_form(teacher, form)
    return load_teacher(config, classes=classes, form=form)


def cached_student(directory: str, trust: Sequence[str] = ()) -> Student:
    """Return this process's copy of a student; a process keeps only the last one, since rounds do not go back.

    Args:
      directory: the student's checkpoint.
      trust: whose code it may call besides what this process trusts; see `load_student`.
    """
    with _lock:
        if directory not in _students:
            _students.clear()
            _students[directory] = load_student(directory, trust)
        return _students[directory]


def cached_language_model(directory: str, device: str, trust: Sequence[str] = ()) -> LanguageModel:
    """Return this process's copy of a student that is a language model, on a device; a process keeps only the last one.

    Args:
      directory: the student's directory.
      device: of torch, where it computes.
      trust: whose code it may call besides what this process trusts; see `load_language_model`.
    """
    from distilbeam.student.language.folder import load_language_model  # classifiers need no transformers

    with _lock:
        if (directory, device) not in _language_models:
            _language_models.clear()
            found = load_language_model(directory, trust)
            found.network.to(device)
            _language_models[directory, device] = found
        return _language_models[directory, device]


def forget_models() -> None:
    """Close and drop every cached model of this process."""
    with _lock:
        for teacher in _teachers.values():
            teacher.close()
        _teachers.clear()
        _students.clear()
        _language_models.clear()
