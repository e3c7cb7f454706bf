"""Train a student in memory: the product's step, optimizer and schedule over rows that need no files.

`distilbeam.student.training.train.train` reads datasets, validates after every epoch, and can be killed; a cell trains a dozen
students in seconds and needs none of it. What is computed in a step is the product's: `step_loss`, `make_optimizer`,
`set_lr`, the clipping. Trained on human labels alone, both give the same weights bit by bit, which a test checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.science.problems import Floats, Problem
from distilbeam.inputs.config import padding_id
from distilbeam.student.data.labelled import Examples
from distilbeam.student.data.loader import Batch
from distilbeam.student.networks.bag import start_from_table
from distilbeam.student.networks.build import build_student
from distilbeam.student.networks.embedding import seen_by_head
from distilbeam.student.training.augment import Mixture
from distilbeam.student.training.batches import HARD, SOFT, StepRows, augmented, deal_out
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.training.loss import step_loss
from distilbeam.student.training.optimizer import make_optimizer, set_lr
from distilbeam.student.training.rng import own_generators
from distilbeam.student.training.sample_weights import forward
from distilbeam.teacher.softlabels import SoftLabelSpec

ROWS = 4096  # of a forward pass
SOFT_ORDER = 7919  # keeps the order of the soft-labelled rows apart from that of the human-labelled ones

Prepare = Callable[[nn.Module, Batch], Batch]
Weigh = Callable[[nn.Module, int], Tensor | None]


@dataclass(frozen=True)
class SoftRows:
    """Soft-labelled rows.

    Attributes:
      columns: `inputs`, `teacher_logprobs` [n, C], and for SLaM `alpha` and `candidates`.
      weight: float32 [n], or None for 1.
      prepare: changes a batch's labels in the light of the current student, or None.
      weigh: gives the weights anew at the start of an epoch (the student, the epoch's number), or None.
    """

    columns: Batch
    weight: Tensor | None = None
    prepare: Prepare | None = None
    weigh: Weigh | None = None

    def __len__(self) -> int:
        return len(self.columns["inputs"])


def fit(
    problem: Problem,
    soft: SoftRows | None,
    hard: Examples | None,
    training: TrainConfig | None = None,
    init: nn.Module | None = None,
    table: Floats | None = None,
) -> nn.Module:
    """Train a student from random weights.

    Args:
      problem: the student's network, its training and its seed.
      soft: rows with the teacher's labels.
      hard: rows with human labels.
      training: instead of the problem's own.
      init: a student whose weights to start from.
      table: embeddings to start from, [V, dim].
    """
    training = training or problem.training
    if training.precision == "bf16":
        from benchmarks.science.on_device import fit_on_device

        return fit_on_device(
            problem, None if soft is None else soft.columns, None if soft is None else soft.weight, hard, training
        )
    count = (0 if soft is None else len(soft)) + (0 if hard is None else len(hard))
    per_epoch = math.ceil(count / training.batch_size)
    epochs = max(1, round(problem.steps / per_epoch))
    device, spec = torch.device(training.device), SoftLabelSpec(num_classes=problem.classes)
    with own_generators(problem.seed, device):
        module = build_student(problem.student, tuple(problem.inputs.shape[1:]), problem.classes)
        if init is not None:
            module.load_state_dict(init.state_dict())
        if table is not None:
            start_from_table(module, table)
        module.to(device)
        optimizer, parameters = make_optimizer(module, training), list(module.parameters())
        done, total = 0, epochs * per_epoch
        for epoch in range(epochs):
            if soft is not None and soft.weigh is not None:
                soft = replace(soft, weight=soft.weigh(module, epoch))
            module.train()
            for rows, weight in _steps(soft, hard, per_epoch, problem, training, epoch):
                if soft is not None and soft.prepare is not None and rows.soft is not None:
                    rows = replace(rows, soft=soft.prepare(module, rows.soft))
                set_lr(optimizer, training, done, total)
                mixture = Mixture.draw(len(rows), training.augment, problem.seed, done, 0)
                loss = step_loss(module, training, rows, spec, weight, mixture, device)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if training.clip is not None:
                    nn.utils.clip_grad_norm_(parameters, training.clip)
                optimizer.step()
                done += 1
    return module


def logits_of(module: nn.Module, problem: Problem, rows: npt.NDArray[np.int64]) -> Floats:
    """Compute the logits of rows, float32 [rows, C]."""
    return forward(module, problem.inputs[torch.from_numpy(rows)].split(ROWS), _device(module))


def embeddings_of(module: nn.Module, problem: Problem, rows: npt.NDArray[np.int64]) -> Floats:
    """Compute what the last linear layer sees of rows, float32 [rows, d]."""
    with seen_by_head(module, problem.classes) as seen:
        logits_of(module, problem, rows)
    return torch.cat(seen).numpy()


def accuracy(module: nn.Module, problem: Problem) -> float:
    """Measure a student on the test rows."""
    return float((logits_of(module, problem, problem.test).argmax(axis=1) == problem.truth[problem.test]).mean())


def _steps(
    soft: SoftRows | None, hard: Examples | None, steps: int, problem: Problem, training: TrainConfig, epoch: int
) -> list[tuple[StepRows, Tensor | None]]:
    seed, reads = problem.seed, problem.student.input
    padding = padding_id(reads) if reads.gives_ids else None

    def changed(inputs: Tensor, rows: Tensor, source: int) -> Tensor:
        return augmented(inputs, rows, training.augment, padding, seed, epoch, source)

    soft_parts = [] if soft is None else _soft_order(len(soft), steps, seed, epoch)
    hard_parts = deal_out(hard, steps, seed, epoch)
    dealt: list[tuple[StepRows, Tensor | None]] = []
    for step in range(steps):
        batch, weight, human = None, None, None
        if soft is not None:
            rows = soft_parts[step]
            batch = {name: column[rows] for name, column in soft.columns.items()}
            batch["inputs"] = changed(batch["inputs"], rows, SOFT)
            weight = None if soft.weight is None else soft.weight[rows]
        if hard is not None:
            rows = hard_parts[step]
            human = Examples(changed(hard.inputs[rows], rows, HARD), hard.classes[rows])
        rows_here = StepRows(batch, human, 0, 1)
        dealt.append((replace(rows_here, count=len(rows_here)), weight))
    return dealt


def _soft_order(count: int, steps: int, seed: int, epoch: int) -> list[Tensor]:
    rows = np.random.default_rng([seed, epoch, count, SOFT_ORDER]).permutation(count)
    return [torch.from_numpy(part) for part in np.array_split(rows, steps)]


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
