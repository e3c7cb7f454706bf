"""Rows of a training's step, made without files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distilbeam.student.data.labelled import Examples
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.training.batches import StepRows
from distilbeam.teacher.softlabels import SoftLabelSpec

CPU, CLASSES, SOFT, HARD = torch.device("cpu"), 7, 6, 3
NUMBERS = {"columns": ["x"]}
TOKENS = {"kind": "tokens", "columns": ["ids"], "max_length": 8, "vocabulary": 30}


def config_of(values: dict[str, Any]) -> StudentConfig:
    """Make a configuration."""
    return StudentConfig.model_validate(values)


def rows_of(shape: tuple[int, ...], kind: str, seed: int = 0) -> tuple[StepRows, SoftLabelSpec]:
    """Draw soft-labelled and human-labelled rows; of token ids where the shape is that of TOKENS."""
    generator = torch.Generator().manual_seed(seed)

    def inputs(count: int) -> Tensor:
        if len(shape) == 1 and shape[0] == 8:
            return torch.randint(1, 30, (count, *shape), generator=generator)
        return torch.randn(count, *shape, generator=generator)

    logprobs = torch.randn(SOFT, CLASSES, generator=generator).log_softmax(1)
    batch = {"inputs": inputs(SOFT), "teacher_logprobs": logprobs}
    if kind == "top_k":
        top = logprobs.topk(3, dim=1)
        tail = torch.log1p(-top.values.exp().sum(1))
        batch |= {"teacher_logprobs": top.values, "teacher_classes": top.indices, "teacher_tail_logmass": tail}
    batch |= {"alpha": torch.rand(SOFT, generator=generator), "candidates": torch.full((SOFT,), 2)}
    hard = Examples(inputs(HARD), torch.randint(0, CLASSES, (HARD,), generator=generator))
    spec = SoftLabelSpec(CLASSES, kind=kind, k=3 if kind == "top_k" else None, teacher="t")
    return StepRows(batch, hard, SOFT + HARD, 1), spec
