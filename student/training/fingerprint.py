"""The fingerprint of a training: everything that its weights depend on, so that a stopped one goes on with nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distilbeam.student.checkpoint import load_student
from distilbeam.student.data.labelled import Examples
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.own_files import content_of, content_of_folder
from distilbeam.student.training.batches import Sources
from distilbeam.student.training.config import FREE, LAST, TrainConfig


def identity(
    student: StudentConfig,
    training: TrainConfig,
    classes: Sequence[str],
    sources: Sources,
    init: str | Path | None,
    validation_teacher: npt.NDArray[np.float32] | None,
) -> dict[str, Any]:
    """Describe a training; see `train` for the arguments.

    Returns:
      Plain data. The soft labels are not in it: they know themselves when their position is put back.
    """
    return {
        "student": _without_places(student),
        "training": training.model_dump(mode="json", exclude={*FREE, *LAST}),
        "classes": list(classes),
        "seed": sources.seed,
        "steps": sources.steps,
        "labelled": _of_examples(sources.hard),
        "validation": _of_examples(sources.held_out),
        "validation_teacher": None if validation_teacher is None else _digest(validation_teacher),
        "init": None if init is None else load_student(init).fingerprint(),
    }


def _without_places(student: StudentConfig) -> dict[str, Any]:
    """Give the student's configuration with the contents of its files in the place of their paths, which may change."""
    data: dict[str, Any] = student.model_dump(mode="json")
    for name in ("init", "encoder"):  # the table that came of them is what counts
        del data[name]
    if student.model is not None:
        data["model"] = content_of_folder(student.model)
    return data | {"input": data["input"] | {"tokenizer": content_of(student.input)}}


def _of_examples(examples: Examples | None) -> str | None:
    return None if examples is None else _digest(examples.inputs.numpy(), examples.classes.numpy())


def _digest(*arrays: npt.NDArray[Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()
