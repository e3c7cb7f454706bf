"""The parts of a run's last training, in memory: cross-fitted students, their pseudo-labels, and whether these are learned.

The validation rows are dealt into as many folds as the ensemble has members; member k learns the human labels, what was bought
and all folds but the k-th, so that it can be judged on that one. `Lesson.by_folds` compares what is learned with and without
pseudo-labels where neither the student nor whoever labelled the pool for it has learned the rows that they are judged on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import log_softmax, logsumexp
from torch import nn

from benchmarks.science.buying import SCHEDULES, rounds, soft_rows
from benchmarks.science.problems import Floats, Indices, Problem
from benchmarks.science.training import fit, logits_of
from distilbeam.inputs.config import padding_id, vocabulary_size
from distilbeam.selection.trust.calibration import fit_temperature
from distilbeam.student.evaluation.cross_validation import folds, held_out_logits
from distilbeam.student.evaluation.metrics import evaluate
from distilbeam.student.evaluation.paired import paired
from distilbeam.student.networks.encoder_table import id_bags, regressed_table, scaled
from distilbeam.student.training.config import TrainConfig

MEMBERS, LONGER, WORDS, MIXUP, RIDGE = 5, 3, 0.2, 0.4, 3.0


@dataclass(frozen=True)
class Lesson:
    """What was bought, and how students learn it.

    Attributes:
      problem: the problem.
      bought: rows of the pool.
      noise: of students that learn pseudo-labels: "words", "mixup", or none.
      encoder: whether embeddings start from the sentence encoder.
    """

    problem: Problem
    bought: Indices
    noise: str = ""
    encoder: bool = False

    def plain(self, known: Indices, seed: int = 0) -> nn.Module:
        """Train a student on what was bought and human labels."""
        soft = soft_rows(self.problem, self.bought, self.problem.teacher_logprobs()[self.bought])
        return fit(self._seeded(seed, 1), soft, self.problem.human(known), table=self._table)

    def with_pseudo(self, pseudo: npt.NDArray[np.float64] | None, known: Indices, seed: int = 0) -> nn.Module:
        """Train a student on pseudo-labels too, [n, C] of all rows, of which it learns those not bought; in `LONGER` times the steps.

        None trains as long without them.
        """
        problem, rows = self._seeded(seed, LONGER), self.bought
        labels = problem.teacher_logprobs()[rows]
        if pseudo is not None:
            rows = np.concatenate([rows, self.left])
            labels = np.concatenate([labels, pseudo[self.left].astype(np.float32)])
        training = self._training if pseudo is not None else problem.training
        return fit(problem, soft_rows(problem, rows, labels), problem.human(known), training, table=self._table)

    @cached_property
    def left(self) -> Indices:
        """Rows of the pool that were not bought."""
        return np.setdiff1d(self.problem.pool, self.bought)

    @cached_property
    def all_human(self) -> Indices:
        """The human labels, those for validation among them."""
        return np.concatenate([self.problem.labelled, self.problem.validation])

    def without(self, fold: Indices) -> Indices:
        """The human labels but for those of a fold."""
        return np.setdiff1d(self.all_human, self.problem.validation[fold])

    @cached_property
    def parts(self) -> list[Indices]:
        """Folds of the validation rows."""
        return folds(len(self.problem.validation), MEMBERS, self.problem.seed)

    @cached_property
    def said(self) -> list[npt.NDArray[np.float64]]:
        """What each cross-fitted member says of all rows."""
        every = np.arange(len(self.problem.inputs))
        members = [self.plain(self.without(part), seed) for seed, part in enumerate(self.parts)]
        return [logits_of(member, self.problem, every).astype(float) for member in members]

    @cached_property
    def unseen(self) -> Floats:
        """Logits for the validation rows by the member that has not learned them."""
        held_out = self.problem.validation
        return held_out_logits(lambda number, rows: self.said[number][held_out[rows]], self.parts)

    @cached_property
    def temperature(self) -> float:
        """What members' logits are divided by."""
        return float(fit_temperature(self.unseen, self.problem.truth[self.problem.validation]).temperature)

    @cached_property
    def ensemble(self) -> npt.NDArray[np.float64]:
        """Log-probabilities of the ensemble of cross-fitted members, of all rows."""
        return mean_logprobs([said / self.temperature for said in self.said])

    def by_folds(self) -> dict[str, Any]:
        """Compare on every validation row what is learned with pseudo-labels of one member and without, neither having seen it."""
        problem, held_out = self.problem, self.problem.validation

        def judged(number: int, rows: Indices) -> Floats:
            pseudo = log_softmax(self.said[number] / self.temperature, axis=1)
            student = self.with_pseudo(pseudo, self.without(self.parts[number]), number)
            return logits_of(student, problem, held_out[rows])

        after, truth = held_out_logits(judged, self.parts), problem.truth[held_out]
        change = paired(self.unseen.argmax(axis=1) == truth, after.argmax(axis=1) == truth)
        loss = {name: evaluate(said, truth)["nll"] for name, said in (("without", self.unseen), ("with", after))}
        return {"won": change.won, "lost": change.lost, **{f"nll_{name}": value for name, value in loss.items()}}

    @property
    def _training(self) -> TrainConfig:
        changes = {"words": {"word_dropout": WORDS}, "mixup": {"mixup": MIXUP}, "": {}}[self.noise]
        training = self.problem.training
        return training.model_copy(update={"augment": training.augment.model_copy(update=changes)})

    @cached_property
    def _table(self) -> Floats | None:
        return encoder_start(self.problem) if self.encoder else None

    def _seeded(self, seed: int, longer: int) -> Problem:
        return replace(self.problem, seed=self.problem.seed + 1000 * seed, steps=longer * self.problem.steps)


def mean_logprobs(logits: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """Average members' probabilities; give their logarithms."""
    return np.asarray(logsumexp([log_softmax(one, axis=1) for one in logits], axis=0) - np.log(len(logits)))


def lesson(problem: Problem, share: float, noise: str, encoder: bool) -> Lesson:
    """Give a lesson on the rows that herding buys with calibrated labels until it has a share of the pool; made once."""
    if (bought := problem.__dict__.get("_bought")) is None:
        figures = rounds(problem, "herding", "small", "calibrated")
        bought = problem.__dict__["_bought"] = [np.array(row["rows"]) for row in figures]
    made = problem.__dict__.setdefault("_lessons", {})
    if (key := (share, noise, encoder)) not in made:
        rows = np.concatenate(bought[: SCHEDULES["small"].index(share) + 1])
        made[key] = Lesson(problem, rows, noise, encoder)
        if (other := made.get((share, "", encoder))) is not None:  # members learn without noise
            made[key].__dict__.update({name: other.__dict__[name] for name in ("said",) if name in other.__dict__})
    found: Lesson = made[key]
    return found


def encoder_start(problem: Problem) -> Floats:
    """Fit the embeddings to the sentence encoder's vectors of the pool and of the labelled rows; once."""
    if (found := problem.__dict__.get("_table")) is None:
        assert problem.vectors is not None
        rows, reads = np.concatenate([problem.pool, problem.labelled]), problem.student.input
        ids = problem.inputs[torch.from_numpy(rows)].numpy()
        both = id_bags(ids, padding_id(reads), vocabulary_size(reads)), problem.vectors[rows]
        table = regressed_table(lambda: iter(both[:1]), lambda: iter([both]), problem.student.dim, RIDGE)
        found = problem.__dict__["_table"] = scaled(table, lambda: iter(both[:1]))
    return np.asarray(found)
