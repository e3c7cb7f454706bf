"""Language models as students: trained token by token from a teacher's stored labels of blocks, in one process or several.

Read in this order: train, config, network, step, sharing, state, threads; scoring (what a student is unsure of), folder (what is saved and
opened again), evaluate, launch; untrained.
Imports: data, networks, checkpoint, training; distilbeam.kernels, distilbeam.teacher.softlabels, distilbeam.inputs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distilbeam.student.language.folder import load_language_model as load_language_model
    from distilbeam.student.language.train import train_language_model as train_language_model

_NAMES = {"load_language_model": "folder", "train_language_model": "train"}  # imported when asked for: they bring torch


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
