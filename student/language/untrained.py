"""A student before its first training, as a folder like a trained one: what it knows without a teacher, and who makes the first choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distilbeam.inputs.tokenizer import load_tokenizer
from distilbeam.student.language.config import LanguageModelConfig
from distilbeam.student.language.folder import save_language_model
from distilbeam.student.language.network import build_language_model, require_suits
from distilbeam.student.language.state import whole_weights
from distilbeam.student.training.rng import own_generators
from distilbeam.teacher.softlabels import SoftLabelSpec


def write_untrained(student: LanguageModelConfig, spec: SoftLabelSpec, directory: str | Path, seed: int) -> None:
    """Write a student with the weights that its training begins with.

    Args:
      student: its configuration.
      spec: of the labels that it is to learn.
      directory: where; it appears complete or not at all.
      seed: that of the training, which decides random weights.

    Raises:
      ValueError: the student has another tokenizer than the labels, or fewer ids or positions.
    """
    tokenizer = load_tokenizer(student.tokenizer or str(student.model), "student.tokenizer")
    tokenizer.require_same(str(spec.tokenizer), spec.num_classes, "the labels")
    with own_generators(seed, torch.device("cpu")):
        network = build_language_model(student, tokenizer)
    require_suits(network, spec.num_classes, spec.sequence_length or 0)
    extra: dict[str, Any] = {"training": None, "seed": seed, "metrics": {}}
    save_language_model(Path(directory), student, network, whole_weights(network), tokenizer, spec, extra)
