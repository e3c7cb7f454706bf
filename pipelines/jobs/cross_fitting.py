"""The last training of a run, where the validation rows are learned as well: cross-fitted students judge and teach.

The validation rows are dealt into as many folds as the ensemble has members.

    members/seed=00K/    a student that learns all validation rows but those of fold K, which choose its epoch
    tried/seed=00K/      pseudo/, by member K alone, and student/, which learns these too: it knows as little of fold K as the member
    gate.json            with and without pseudo-labels, every validation row judged by the student that has not learned it
    pseudo/              soft labels of all members together for rows of the pool that were not bought
    student/             the last training: all labelled rows, what was bought and, where they help, pseudo-labels
    final.json           what came of it

Whoever has learned the validation rows labels the pool much better than who has not, and is at the same time judged on them: the
gate sees where a student of the validation rows alone is the better one, and the figures are honest where there is no test set.
Temperature and the last student's epoch are those that suit the rows that members have not learned. The teacher is not asked.

References:
  Chernozhukov et al., Double/debiased machine learning, 2018 (cross-fitting); Xie et al., Self-training with Noisy Student,
  arXiv 1911.04252.
"""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.pipelines.jobs.final_result import learns_validation
from distilbeam.pipelines.jobs.final_training import FinalTraining, Part, with_noise
from distilbeam.pipelines.jobs.recorded_phases import RecordedPhases
from distilbeam.pipelines.jobs.run import Run
from distilbeam.progress import Progress
from distilbeam.selection.trust.calibration import fit_temperature
from distilbeam.storage.files import read_json, write_json
from distilbeam.student.checkpoint import load_student
from distilbeam.student.evaluation.cross_validation import Indices, folds, held_out_logits
from distilbeam.student.evaluation.paired import paired
from distilbeam.student.training.metrics_log import read_epochs


class CrossFittedTraining(FinalTraining):
    """The last training with the validation rows, part by part; see `FinalTraining`."""

    def member(self, number: int) -> Path:
        """Directory of a member of the ensemble."""
        return self.where / "members" / f"seed={number:03d}"

    def tried(self, number: int) -> Path:
        """Directory of the student that learns a member's pseudo-labels too."""
        return self.where / "tried" / f"seed={number:03d}" / "student"

    @cached_property
    def parts_of_validation(self) -> list[Indices]:
        """The folds."""
        config, rows = self.run.config, len(self.run.truth("validation"))
        return folds(rows, min(max(2, config.training.ensemble), rows), config.run.seed)

    def parts(self) -> list[Part]:
        """List what is to be done; members are needed for pseudo-labels, and for figures where there is no test set."""
        config = self.run.config
        parts: list[Part] = []
        if self.done.exists():  # how many folds there are needs the data, which a finished run is not read for
            return [("final: the last training", self.done, self.learn)]
        if config.training.self_training or config.data.test is None:
            count = len(self.parts_of_validation)
            parts += [
                (f"final: train student {n + 1} of {count}", self.member(n), partial(self.train_member, n))
                for n in range(count)
            ]
            if config.training.self_training:
                parts += [
                    (f"final: try pseudo-labels {n + 1} of {count}", self._tried_rows(n), partial(self.try_member, n))
                    for n in range(count)
                ]
                parts.append(("final: compare with and without pseudo-labels", self.gate, self.judge))
        return [*parts, ("final: the last training", self.done, self.learn)]

    def train_member(self, number: int, progress: Progress) -> None:
        """Train a member on all labelled rows but those of its fold."""
        self._train_without_fold(self.member(number), number, None, progress)

    def try_member(self, number: int, progress: Progress) -> None:
        """Label the pool by one member, and train a student like it on these labels too."""
        pseudo = self.tried(number).with_name("pseudo")
        rows = self.give_labels(pseudo, [self.member(number)], self.temperature, progress, each=True)
        if rows and not self.tried(number).exists():
            self._train_without_fold(self.tried(number), number, pseudo, progress)
        write_json(self._tried_rows(number), {"rows": rows})

    def judge(self, progress: Progress) -> None:  # noqa: ARG002 - the signature of a part
        """Keep pseudo-labels only where students are better with them on the rows that neither they nor their teacher learned.

        Better is: more rows right, or as many with a smaller loss.
        """
        count = len(self.parts_of_validation)
        rows = min(int(read_json(self._tried_rows(number))["rows"]) for number in range(count))
        before = self.unseen_logits(with_pseudo=False)
        there = {"rows": rows, "temperature": self.temperature, "members": count}
        figures: dict[str, Any] = {"ensemble": there, "before": self.judged(before), "kept": False}
        if rows:
            after, truth = self.unseen_logits(with_pseudo=True), self.run.truth("validation")
            change = paired(before.argmax(axis=1) == truth, after.argmax(axis=1) == truth)
            figures |= {"after": self.judged(after), "won": change.won, "lost": change.lost}
            figures["kept"] = helps(figures["before"], figures["after"])
        write_json(self.gate, figures)

    def learn(self, progress: Progress) -> None:
        """Train the student that learns all labelled rows, for as many epochs as served those that did not."""
        kept = self.gate.exists() and bool(read_json(self.gate)["kept"])
        members, student = self.member(0).exists(), self.where / "student"
        pseudo: list[Path] = []
        if kept:
            every = [self.member(number) for number in range(len(self.parts_of_validation))]
            self.give_labels(self.pseudo, every, self.temperature, progress, each=True)
            pseudo = [self.pseudo]
        if not student.exists():
            training, base = self.run.config.training, self.run.directory.student(self.kept)
            self.run.train(
                student,
                self.bought,
                progress,
                training=with_noise(training, base) if kept else training,
                labelled=self._learned(np.arange(len(self.run.truth("validation")))),
                held_out=False,
                pseudo_labels=pseudo,
                last_epoch=self._epoch(kept) if members else int(load_student(base).extra["metrics"]["best_epoch"]),
            )
        judged = {"cross_validated": self.judged(self.unseen_logits(kept))} if members else {}
        self.say(student, validation_rows=True, **judged)

    @cached_property
    def temperature(self) -> float:
        """What a member's logits are divided by: it suits the rows that members have not learned."""
        logits = self.unseen_logits(with_pseudo=False)
        return float(fit_temperature(logits, self.run.truth("validation")).temperature)

    def unseen_logits(self, with_pseudo: bool) -> npt.NDArray[np.float32]:
        """Give logits for the validation rows, float32 [rows, classes], each by the student that has not learned it."""
        student = self.tried if with_pseudo else self.member
        return held_out_logits(
            lambda number, rows: self.run.student_logits(student(number), "validation")[rows], self.parts_of_validation
        )

    def _epoch(self, with_pseudo: bool) -> int:
        """Find the epoch of the least loss over all folds: early stopping, cross-validated."""
        student = self.tried if with_pseudo else self.member
        losses = [
            np.array([figures["validation_nll"] for figures in read_epochs(student(number))]) * len(rows)
            for number, rows in enumerate(self.parts_of_validation)
        ]
        shared = min(map(len, losses))  # who stopped early has no later ones
        return int(np.sum([loss[:shared] for loss in losses], axis=0).argmin()) + 1

    def _train_without_fold(self, student: Path, number: int, pseudo: Path | None, progress: Progress) -> None:
        fold, training = self.parts_of_validation[number], self.run.config.training
        self.run.train(
            student,
            self.bought,
            progress,
            training=training if pseudo is None else with_noise(training, self.member(number)),
            labelled=self._learned(np.setdiff1d(np.arange(len(self.run.truth("validation"))), fold)),
            validation=self.run.inputs.validation.table.take(fold),
            pseudo_labels=[] if pseudo is None else [pseudo],
            seed=self.seed(number),
        )

    def _learned(self, rows: Indices) -> pa.Table:
        """Join the labelled set and rows of the validation set."""
        inputs = self.run.inputs
        names = list(dict.fromkeys([*inputs.student_columns, self.run.config.data.label]))
        labelled = inputs.labelled.table.select(names)
        return pa.concat_tables([labelled, inputs.validation.table.select(names).take(rows).cast(labelled.schema)])

    def _tried_rows(self, number: int) -> Path:
        return self.tried(number).with_name("tried.json")


def helps(before: dict[str, float], after: dict[str, float]) -> bool:
    """Tell whether pseudo-labels are learned, by accuracy and loss without them and with them."""
    return (after["accuracy"], -after["nll"]) > (before["accuracy"], -before["nll"])


def last_training(run: Run, phases: RecordedPhases) -> FinalTraining:
    """Choose the form of the last training."""
    return (CrossFittedTraining if learns_validation(run) else FinalTraining)(run, phases)
