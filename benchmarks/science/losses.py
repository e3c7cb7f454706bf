"""What a student can learn from labels that are sometimes wrong: study 2's methods, as rows and configurations.

| name | what is learned |
|---|---|
| soft, calibrated, hard | the teacher's distribution as it is, at the calibrated temperature, or its first class |
| weighted, weighted-epochs | the calibrated one times the debiasing weight: estimated once, or at every epoch |
| slam-... | Student-Label Mixing of the calibrated one: `plain`, `normalised`, `forward`; candidates 2 or estimated (`-m`) |
| slam+weighted | normalised mixing with estimated candidates, times the weight |
| partial | that the truth is among the calibrated teacher's first two |
| filtered | the calibrated one where the teacher is likelier right than wrong |
| pp-ssl | pseudo-labels, their bias taken out by the difference to the human labels (arXiv 2510.22586) |
| pooled | the teacher's and the student's beliefs, pooled as the validation labels say (ours) |
| pooled+weighted | the same with debiasing weights for the pooled labels |
| nothing, truth | the human labels alone; the true classes of what was bought: from below and from above |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.science.buying import Situation, first_student, soft_rows
from benchmarks.science.problems import Floats, Indices, Problem
from benchmarks.science.training import SoftRows, fit, logits_of
from distilbeam.selection.trust.debias import DebiasEstimator, rescale
from distilbeam.selection.trust.noise import TeacherNoise
from distilbeam.student.data.labelled import Examples
from distilbeam.student.data.loader import Batch
from distilbeam.student.training.config import TrainConfig

LIKELY = 0.5  # filtered: the teacher's estimated accuracy that a label needs


@dataclass(frozen=True)
class Lesson:
    """What a student is trained on."""

    soft: SoftRows | None
    hard: Examples
    training: TrainConfig


def learn(problem: Problem, bought: Indices, name: str) -> nn.Module:
    """Train a student on the human labels and on what was bought.

    Args:
      problem: the problem.
      bought: rows of the pool that the teacher was asked about.
      name: a key of `LOSSES`.
    """
    lesson = LOSSES[name](problem, bought)
    return fit(problem, lesson.soft, lesson.hard, lesson.training)


def _labels(problem: Problem, bought: Indices, kind: str) -> Lesson:
    return Lesson(
        soft_rows(problem, bought, problem.teacher_logprobs(kind)[bought]),
        problem.human(problem.labelled),
        problem.training,
    )


def _truth(problem: Problem, bought: Indices) -> Lesson:
    return Lesson(None, problem.human(np.concatenate([problem.labelled, bought])), problem.training)


def _nothing(problem: Problem, bought: Indices) -> Lesson:  # noqa: ARG001 - the signature of a lesson
    return Lesson(None, problem.human(problem.labelled), problem.training)


def weights(
    problem: Problem, bought: Indices, student: nn.Module, answers: Callable[[Indices], Floats] | None = None
) -> Tensor:
    """Estimate the debiasing weights of the bought rows under a student, float32 [bought], with mean 1.

    The teacher's labels are the calibrated ones, or what `answers` says of rows.
    """
    held_out, teacher = problem.validation, problem.teacher_logprobs()
    if answers is not None:
        teacher = np.zeros_like(teacher)
        teacher[held_out], teacher[bought] = answers(held_out), answers(bought)
    estimator = DebiasEstimator.fit(
        logits_of(student, problem, held_out), teacher[held_out], problem.truth[held_out], soft=True
    )
    found = rescale(estimator.weights(logits_of(student, problem, bought), teacher[bought]))
    return torch.from_numpy(found.astype(np.float32))


def _weighted(problem: Problem, bought: Indices, epochs: bool = False) -> Lesson:
    lesson = _labels(problem, bought, "calibrated")
    assert lesson.soft is not None
    once = weights(problem, bought, first_student(problem))

    def again(student: nn.Module, epoch: int) -> Tensor:
        return weights(problem, bought, student) if epoch else once

    return replace(lesson, soft=replace(lesson.soft, weight=once, weigh=again if epochs else None))


def noise_of(problem: Problem, floor: float = 0.5) -> TeacherNoise:
    """Fit the teacher's accuracy and candidates on the validation set."""
    held_out = problem.validation
    return TeacherNoise.fit(problem.teacher_logprobs()[held_out], problem.truth[held_out], floor=floor)


def _slam(problem: Problem, bought: Indices, mixing: str, estimated: bool, weighted: bool = False) -> Lesson:
    lesson = _weighted(problem, bought) if weighted else _labels(problem, bought, "calibrated")
    assert lesson.soft is not None
    noise, teacher = noise_of(problem), problem.teacher_logprobs()[bought]
    candidates = noise.candidates(teacher) if estimated else np.full(len(bought), 2)
    columns = {
        **lesson.soft.columns,
        "alpha": torch.from_numpy(noise.accuracy(teacher).astype(np.float32)),
        "candidates": torch.from_numpy(candidates),
    }
    training = problem.training.model_copy(update={"objective": "slam", "mixing": mixing})
    return replace(lesson, soft=replace(lesson.soft, columns=columns), training=training)


def _filtered(problem: Problem, bought: Indices) -> Lesson:
    likely = noise_of(problem, floor=0.0).accuracy(problem.teacher_logprobs()[bought]) >= LIKELY
    return _labels(problem, bought[likely], "calibrated") if likely.any() else _nothing(problem, bought)


def _partial(problem: Problem, bought: Indices) -> Lesson:
    """Minimise -log of the student's mass on the teacher's first two classes.

    Its gradient is that of the cross-entropy to the student's own probabilities, normalised over the two, which are
    therefore each batch's labels.
    """
    lesson = _labels(problem, bought, "calibrated")
    assert lesson.soft is not None

    def prepare(student: nn.Module, batch: Batch) -> Batch:
        with torch.no_grad():
            logits_BC = student(batch["inputs"])
        outside = torch.ones_like(logits_BC, dtype=torch.bool)
        outside.scatter_(1, batch["teacher_logprobs"].topk(2).indices, False)
        return {**batch, "teacher_logprobs": logits_BC.masked_fill(outside, -torch.inf).log_softmax(1)}

    return replace(lesson, soft=replace(lesson.soft, prepare=prepare))


def _pp_ssl(problem: Problem, bought: Indices) -> Lesson:
    """Minimise share * l(bought, teacher) + l(human rows, truth) - share * l(human rows, teacher), means each.

    Unbiased where the bought rows are drawn as the human-labelled ones were. The share, N / (N + n) for N bought and n
    human labels, is the one that is best for a teacher as good as the truth.
    """
    known, both = problem.labelled, np.concatenate([bought, problem.labelled])
    share, total = len(bought) / len(both), len(both)
    scale = total / (1 + share)  # the positive terms weigh as much together as there are rows
    weight = np.concatenate(
        [np.full(len(bought), scale * share / len(bought)), np.full(len(known), -scale * share / len(known))]
    )
    soft = replace(
        soft_rows(problem, both, problem.teacher_logprobs()[both]), weight=torch.from_numpy(weight.astype(np.float32))
    )
    training = problem.training.model_copy(update={"hard_weight": scale / len(known)})
    return Lesson(soft, problem.human(known), training)


def _pooled(problem: Problem, bought: Indices, weighted: bool = False) -> Lesson:
    student = first_student(problem)
    situation = Situation(problem, student, bought, bought[:0], 0)

    def answers(rows: Indices) -> Floats:
        return situation.answers(rows, "pooled")

    weight = weights(problem, bought, student, answers) if weighted else None
    soft = replace(soft_rows(problem, bought, answers(bought)), weight=weight)
    return Lesson(soft, problem.human(problem.labelled), problem.training)


Maker = Callable[[Problem, Indices], Lesson]


def _slams() -> dict[str, Maker]:
    def maker(mixing: str, estimated: bool) -> Maker:
        return lambda problem, bought: _slam(problem, bought, mixing, estimated)

    forms = [(mixing, estimated) for mixing in ("plain", "normalised", "forward") for estimated in (False, True)]
    return {f"slam-{mixing}{'-m' if estimated else ''}": maker(mixing, estimated) for mixing, estimated in forms}


PUBLISHED: dict[str, Maker] = {
    "soft": lambda problem, bought: _labels(problem, bought, "soft"),
    "calibrated": lambda problem, bought: _labels(problem, bought, "calibrated"),
    "hard": lambda problem, bought: _labels(problem, bought, "hard"),
    "weighted": _weighted,
    "weighted-epochs": lambda problem, bought: _weighted(problem, bought, epochs=True),
    **_slams(),
    "slam+weighted": lambda problem, bought: _slam(problem, bought, "normalised", estimated=True, weighted=True),
    "partial": _partial,
    "filtered": _filtered,
    "pp-ssl": _pp_ssl,
}
BOUNDS: dict[str, Maker] = {"nothing": _nothing, "truth": _truth}
OURS: dict[str, Maker] = {
    "pooled": _pooled,
    "pooled+weighted": lambda problem, bought: _pooled(problem, bought, weighted=True),
}
LOSSES = {**PUBLISHED, **OURS, **BOUNDS}
