"""Rounds of choosing, asking the teacher and training: what a run of the product does, in memory.

Each round the student of the round before is asked about the pool, a selector chooses, the teacher's labels are added, and
a student is trained from random weights on the human labels and everything bought so far.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax
from torch import nn

from benchmarks.science.problems import Floats, Indices, Problem
from benchmarks.science.training import SoftRows, accuracy, embeddings_of, fit, logits_of
from distilbeam.selection.gains import margin_gain
from distilbeam.selection.strategies.registry import names, selector, strategy_class
from distilbeam.selection.strategies.selectors import CandidatePool
from distilbeam.selection.trust.local_errors import ClassErrors, LocalErrors
from distilbeam.selection.trust.noise import TeacherNoise, teacher_errors
from distilbeam.selection.trust.pooling import BeliefPool

FLOOR = np.log(1e-4)  # a probability below counts as this much: one example must not outweigh the others
# cumulative shares of the pool after each round
SCHEDULES = {"small": (0.02, 0.05, 0.10), "large": (0.125, 0.25, 0.50)}


@dataclass(frozen=True)
class Situation:
    """What is known when a round's labels are to be chosen.

    Attributes:
      problem: the problem; its truth is for nobody but `oracle`.
      student: of the round before.
      left: rows of the pool that are not bought.
      bought: rows that are.
      number: of the round, from 0.
    """

    problem: Problem
    student: nn.Module
    left: Indices
    bought: Indices
    number: int

    def pool(self, embeddings: bool = False, errors: str = "") -> CandidatePool:
        """Describe the pool to a selector; `errors` by "gain" or by "class"."""
        problem, known = self.problem, np.concatenate([self.problem.labelled, self.bought])
        logits = logits_of(self.student, problem, self.left)
        more: dict[str, Any] = {}
        if embeddings:
            more["embeddings"] = embeddings_of(self.student, problem, self.left)
            more["labelled_embeddings"] = embeddings_of(self.student, problem, known)
        if errors == "gain":
            seen, outcomes = self.outcomes()
            fitted, gains = LocalErrors.fit(margin_gain(seen), outcomes), margin_gain(logits)
            more |= {"errors": fitted.errors(gains), "caps": fitted.caps(gains)}
        if errors == "class":
            more["errors"] = ClassErrors.fit(*self.outcomes()).errors(logits)
        return CandidatePool(len(self.left), logits, **more)

    def outcomes(self) -> tuple[Floats, np.ndarray]:
        """Say where the teacher is wrong: the student's logits and errors in [0, 1] of what is known about.

        On the validation set it is seen; on what was bought it is expected, from the teacher's margin.
        """
        problem = self.problem
        rows = np.concatenate([problem.validation, self.bought])
        noise = TeacherNoise.fit(
            problem.teacher_logprobs()[problem.validation], problem.truth[problem.validation], floor=0.0
        )
        seen = (~problem.right[problem.validation]).astype(float)
        expected = 1 - noise.accuracy(problem.teacher_logprobs()[self.bought]) if len(self.bought) else np.zeros(0)
        return logits_of(self.student, problem, rows), np.concatenate([seen, expected])

    def belief(self) -> BeliefPool:
        """Fit how much to believe the teacher and the student, on the validation set."""
        problem, held_out = self.problem, self.problem.validation
        student = logits_of(self.student, problem, held_out)
        return BeliefPool.fit(problem.teacher_logprobs("soft")[held_out], student, problem.truth[held_out])

    def worth(self) -> float:
        """Estimate what a wrong label is worth beside a right one, in [0, 1], on the validation set.

        A label's worth is what it adds to the student's log-probability of the truth, in nats, if the student came to
        believe it: log y(truth) - log student(truth) with y the pooled label.
        """
        problem, held_out = self.problem, self.problem.validation
        student = log_softmax(logits_of(self.student, problem, held_out).astype(float), axis=1)
        pooled = self.belief().labels(problem.teacher_logprobs("soft")[held_out], student)
        rows = np.arange(len(held_out)), problem.truth[held_out]
        added, right = np.maximum(pooled[rows], FLOOR) - np.maximum(student[rows], FLOOR), problem.right[held_out]
        if right.all() or not right.any() or added[right].mean() <= 0:
            return 0.0
        return float(np.clip(added[~right].mean() / added[right].mean(), 0.0, 1.0))

    def answers(self, rows: Indices, kind: str) -> Floats:
        """Ask the teacher about rows; `pooled` joins what the student of the round before believes."""
        teacher = self.problem.teacher_logprobs("soft" if kind == "pooled" else kind)[rows]
        if kind != "pooled":
            return teacher
        student = logits_of(self.student, self.problem, rows)
        return self.belief().labels(teacher, student).astype(np.float32)

    @property
    def wrong(self) -> float:
        """k: how many labels of what is left the teacher is expected to get wrong."""
        problem = self.problem
        held_out = problem.validation
        return teacher_errors(problem.teacher_logprobs()[held_out], problem.truth[held_out], len(self.left)).wrong


Chooser = Callable[[Situation, int, np.random.Generator], np.ndarray]


def _registered(
    name: str, situation: Situation, budget: int, rng: np.random.Generator, errors: str = "gain"
) -> np.ndarray:
    """Choose with a strategy of the registry, told what it reads."""
    strategy = strategy_class(name)
    pool = situation.pool("embeddings" in strategy.reads, errors if "errors" in strategy.reads else "")
    known = {"wrong": situation.wrong} if hasattr(strategy, "wrong") else {}
    return selector(name, **known).select(pool, budget, rng)


def _worth(situation: Situation, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Play the game in which a wrong label pays the share `worth` of a right one.

    With z' = (1 - worth) z it is the game with caps 1 - worth and (1 - worth) k wrong labels; worth 0 is RAD, 1 is margin.
    """
    pool, harm = situation.pool(), 1 - situation.worth()
    rates = np.full(pool.size, harm)
    known = CandidatePool(pool.size, pool.logits, errors=rates * situation.wrong / pool.size, caps=rates)
    return selector("rad-capped").select(known, budget, rng)


def _oracle(situation: Situation, budget: int, rng: np.random.Generator) -> np.ndarray:
    """Choose the largest margins among the labels that are right: what no method can know."""
    pool = situation.pool()
    errors = (~situation.problem.right[situation.left]).astype(float)
    return selector("correct-gain").select(CandidatePool(pool.size, pool.logits, errors=errors), budget, rng)


PUBLISHED: dict[str, Chooser] = {
    name: partial(_registered, name)
    for name in ("uniform", "margin", "entropy", "k-center", "cluster-margin", "badge", "herding", "rad", "rad-loss")
}
OURS: dict[str, Chooser] = {
    **{name: partial(_registered, name) for name in ("rad-capped", "correct-gain")},
    "correct-gain-class": partial(_registered, "correct-gain", errors="class"),
    "rad-worth": _worth,
}
BOUNDS: dict[str, Chooser] = {"oracle": _oracle}
METHODS = {**PUBLISHED, **OURS, **BOUNDS}
# strategies of the registry that a study computes where they are named (`--methods`); a new one is among them by itself
OTHERS: dict[str, Chooser] = {name: partial(_registered, name) for name in names() if name not in METHODS}


def soft_rows(problem: Problem, rows: Indices, logprobs: Floats) -> SoftRows:
    """Put rows and their labels together."""
    return SoftRows({"inputs": problem.inputs[torch.from_numpy(rows)], "teacher_logprobs": torch.from_numpy(logprobs)})


def first_student(problem: Problem) -> nn.Module:
    """Train the student of the human labels alone; the same for all methods."""
    if (student := problem.__dict__.get("_first")) is None:
        student = fit(problem, None, problem.human(problem.labelled))
        problem.__dict__["_first"] = student
    return student


def rounds(problem: Problem, method: str, schedule: str, kind: str) -> list[dict[str, Any]]:
    """Buy in rounds and measure after each.

    Args:
      problem: what about.
      method: a key of `METHODS` or `OTHERS`.
      schedule: a key of `SCHEDULES`.
      kind: the labels the student learns from: `calibrated`, `soft`, `hard` or `pooled`.

    Returns:
      For each round `budget` (share of the pool), `bought` (labels), `accuracy` of the student on the test rows,
      `teacher_error` among all that was bought, `gain_expected` (mean margin gain of the round's labels times the
      validation accuracy) and `gain_correct` (the same over the labels that are right), `select_s` (processor seconds of
      scoring and choosing), `rows` (what was bought in the round).
    """
    student, bought, left = first_student(problem), np.zeros(0, np.int64), problem.pool
    human, figures = problem.human(problem.labelled), []
    answers = np.zeros((0, problem.classes), np.float32)
    for number, share in enumerate(SCHEDULES[schedule]):
        budget = round(share * len(problem.pool)) - len(bought)
        start = time.process_time()
        situation = Situation(problem, student, left, bought, number)
        chosen = {**METHODS, **OTHERS}[method](situation, budget, problem.rng(number, 1))
        seconds = time.process_time() - start
        gains = margin_gain(logits_of(student, problem, left[chosen]))
        right = problem.right[left[chosen]]
        bought, new = np.concatenate([bought, left[chosen]]), left[chosen]
        answers, left = np.concatenate([answers, situation.answers(new, kind)]), left[~chosen]
        student = fit(problem, soft_rows(problem, bought, answers), human)
        figures.append(
            {
                "round": number,
                "budget": share,
                "bought": len(bought),
                "accuracy": accuracy(student, problem),
                "teacher_error": float((~problem.right[bought]).mean()),
                "gain_expected": float(gains.mean() * problem.right[problem.validation].mean()),
                "gain_correct": float((gains * right).mean()),
                "select_s": seconds,
                "rows": new.tolist(),
            }
        )
    return figures
