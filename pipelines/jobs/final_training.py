"""The last training of a run: a student that also learns the rows that were not bought, and the validation rows.

    members/seed=00K/    students that are trained like the kept one, with other seeds; it is the first member itself
    pseudo/              their soft labels for rows of the pool that were not bought, a dataset of its own
    candidate/           a student that learns these too; where it is not better on the validation set, they are left out
    informed/            members that learn the validation rows as well, and their pseudo-labels
    student/             the last training, which learns the validation rows as well: temperature, weights and epoch are fixed then
    final.json           what came of it

in run/final/round=NNN-DIGEST, with the digest of the settings. The teacher is not asked, and every part is committed like a run's
other steps: a killed call goes on with the part that is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.pipelines.jobs.kept_student import kept_round
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.labelling.pseudo_labels import PseudoLabel, mean_logprobs, pseudo_spec
from distilbeam.progress import Progress
from distilbeam.selection.trust.calibration import fit_temperature
from distilbeam.storage.files import read_json, write_json
from distilbeam.student.checkpoint import load_student
from distilbeam.student.evaluation.metrics import evaluate
from distilbeam.student.training.batches import TEXTS
from distilbeam.student.training.config import LAST, TrainConfig
from distilbeam.student.trust import trusted
from distilbeam.teacher.softlabels import read_manifest

if TYPE_CHECKING:
    from distilbeam.pipelines.jobs.recorded_phases import RecordedPhases

WORDS = 0.2  # share of the words that a student of pseudo-labels does not see; study 7
SHIFT = 8  # an eighth of an image's side is the most that it is shifted


class FinalTraining:
    """The last training, part by part.

    Args:
      run: the run.
      phases: carries the pseudo-label phase out.
    """

    def __init__(self, run: Run, phases: RecordedPhases) -> None:
        self.run, self.phases, self.where = run, phases, final_directory(run)

    @cached_property
    def kept(self) -> int:
        """Round of the student that it goes out from."""
        return kept_round(self.run)[0]

    def member(self, number: int) -> Path:
        """Directory of a member of the ensemble; the first is the kept student."""
        return self.run.directory.student(self.kept) if not number else self.where / "members" / f"seed={number:03d}"

    @property
    def pseudo(self) -> Path:
        """The dataset of pseudo-labels."""
        return self.where / "pseudo"

    @property
    def gate(self) -> Path:
        """Whether they help."""
        return self.where / "gate.json"

    @property
    def done(self) -> Path:
        """What came of it."""
        return self.where / "final.json"

    def train_member(self, number: int, progress: Progress) -> None:
        """Train a member of the ensemble: the kept student with another seed."""
        self.run.train(self.member(number), self._bought, progress, seed=self.run.config.run.seed + 1000 * number)

    def label(self, progress: Progress) -> None:
        """Give soft labels to rows that were not bought, by the phase; a phase that was killed goes on."""
        members = [self.member(number) for number in range(self.run.config.training.ensemble)]
        said = mean_logprobs([self.run.student_logits(member, "validation") for member in members])
        temperature = fit_temperature(said, self.run.truth("validation")).temperature
        rows = self._label(self.pseudo, members, temperature, progress)
        figures = {"rows": rows, "temperature": temperature, "members": len(members), **self._judged(said)}
        write_json(self.run.directory.summary(self.pseudo), figures)

    def _label(self, output: Path, members: Sequence[Path], temperature: float, progress: Progress) -> int:
        """Carry the phase out; return how many rows have a pseudo-label."""
        run, config = self.run, self.run.config
        bought: int = sum(read_manifest(run.directory.labels(r)).rows for r in range(config.run.rounds))
        spec = read_manifest(self._bought[0]).spec if self._bought else run.label_spec
        work = PseudoLabel(
            students=tuple(map(str, members)),
            spec=pseudo_spec(spec, [load_student(member).fingerprint() for member in members], temperature),
            output=str(output),
            bought=tuple(str(run.directory.picks(r)) for r in range(config.run.rounds)),
            share=min(1.0, config.training.pseudo_rows / max(run.inputs.pool.rows - bought, 1)),
            seed=config.run.seed,
            columns=run.inputs.student_columns,
            id_column=config.data.id,
            batch_rows=config.engine.batch_rows,
            trust=trusted(),
        )
        self.phases.carry_out("pseudo", work, run.inputs.pool.units, progress)
        rows: int = read_manifest(output).rows if any(output.glob("*.parquet")) else 0
        return rows

    def judge(self, progress: Progress) -> None:
        """Train a student that learns them too, and keep them only where it is better on the validation set.

        Better is: more rows right, or as many with a smaller loss. Neither student has learned these rows.
        """
        there = read_json(self.run.directory.summary(self.pseudo))
        before = self._judged(self.run.student_logits(self.member(0), "validation"))
        figures: dict[str, Any] = {"ensemble": there, "before": before, "kept": False}
        if there["rows"]:
            if not self._candidate.exists():
                training = with_noise(self.run.config.training, self.member(0))
                self.run.train(self._candidate, self._bought, progress, training=training, pseudo_labels=[self.pseudo])
            after = self._judged(self.run.student_logits(self._candidate, "validation"))
            better = (after["accuracy"], -after["nll"]) > (before["accuracy"], -before["nll"])
            figures |= {"after": after, "kept": better}
        write_json(self.gate, figures)

    def learn(self, progress: Progress) -> None:
        """Train the student that also learns the validation rows, for as many epochs as served the one that did not."""
        kept = self.gate.exists() and bool(read_json(self.gate)["kept"])
        base, student = (self._candidate if kept else self.member(0)), None
        if learns_validation(self.run):
            student = self.where / "student"
            if not student.exists():
                pseudo = [self._informed_labels(progress)] if kept else []
                self._train_on_all(student, base, pseudo, 0, progress)
        elif kept:
            student = base
        figures = {
            "student": None if student is None else student.name,
            "kept_round": self.kept,
            "pseudo_labels": kept,
            "validation_rows": learns_validation(self.run),
            **({"gate": read_json(self.gate)} if self.gate.exists() else {}),
        }
        write_json(self.done, figures)

    def _informed_labels(self, progress: Progress) -> Path:
        """Label the pool again by members that have learned the validation rows too, at the temperature that was fitted before."""
        output, number = self.where / "informed" / "pseudo", self.run.config.training.ensemble
        members = [self.where / "informed" / f"seed={n:03d}" for n in range(number)]
        for seed, member in enumerate(members):
            if not member.exists():
                self._train_on_all(member, self.member(seed), [], seed, progress)
        self._label(output, members, read_json(self.run.directory.summary(self.pseudo))["temperature"], progress)
        return output

    def _train_on_all(self, student: Path, base: Path, pseudo: list[Path], number: int, progress: Progress) -> None:
        """Train a student like `base`, which learned all but the validation rows, on these too."""
        training = self.run.config.training
        self.run.train(
            student,
            self._bought,
            progress,
            training=with_noise(training, base) if pseudo else training,
            labelled=self._all_labelled(),
            held_out=False,
            pseudo_labels=pseudo,
            last_epoch=int(load_student(base).extra["metrics"]["best_epoch"]),
            seed=self.run.config.run.seed + 1000 * number,
        )

    @property
    def _candidate(self) -> Path:
        return self.where / "candidate"

    @property
    def _bought(self) -> list[Path]:
        return self.run.soft_labels[: self.kept]

    def _judged(self, logits: npt.NDArray[np.floating]) -> dict[str, float]:
        found = evaluate(np.asarray(logits, np.float32), self.run.truth("validation"))
        return {name: found[name] for name in ("accuracy", "nll")}

    def _all_labelled(self) -> pa.Table:
        inputs = self.run.inputs
        names = list(dict.fromkeys([*inputs.student_columns, self.run.config.data.label]))
        labelled = inputs.labelled.table.select(names)
        return pa.concat_tables([labelled, inputs.validation.table.select(names).cast(labelled.schema)])


def is_wanted(run: Run) -> bool:
    """Tell whether a run has a last training; blind distillation, whose last phase is another one, has none."""
    training = run.config.training
    return training.finetune is None and (training.self_training or learns_validation(run))


def learns_validation(run: Run) -> bool:
    """Tell whether the last training learns the validation rows, on which nothing is measured then."""
    setting = run.config.training.final_training
    return setting == "all" or (setting == "auto" and run.config.data.test is not None)


def final_directory(run: Run) -> Path:
    """Give the folder of the last training after the configuration's rounds."""
    training, test = run.config.training, run.config.data.test is not None
    about = json.dumps([*(getattr(training, name) for name in LAST), test], default=str)
    digest = hashlib.blake2b(about.encode(), digest_size=4).hexdigest()
    return run.directory.root / "final" / f"round={run.config.run.rounds:03d}-{digest}"


def final_result(run: Run) -> dict[str, Any] | None:
    """Read what came of the last training; None where the run has none, or not yet."""
    path = final_directory(run) / "final.json"
    if not is_wanted(run) or not path.exists():
        return None
    found: dict[str, Any] = read_json(path)
    return found


def final_student(run: Run) -> Path | None:
    """Give the student of the last training; None where there is none, or it is that of a round."""
    found = final_result(run)
    return None if found is None or found["student"] is None else final_directory(run) / found["student"]


def final_sentence(found: dict[str, Any]) -> str:
    """Say what came of the last training; see `FinalTraining.learn`."""
    parts = []
    if (gate := found.get("gate")) is not None:
        rows, before = gate["ensemble"]["rows"], gate["before"]
        if "after" not in gate:
            parts.append("There were no rows left for pseudo-labels")
        else:
            verb = "help and are learned" if gate["kept"] else "do not help and are left out"
            parts.append(
                f"Pseudo-labels of {gate['ensemble']['members']} students for {rows:,} rows that were not bought {verb}: "
                f"{gate['after']['accuracy']:.1%} of the validation rows right with them, {before['accuracy']:.1%} without"
            )
    if found["validation_rows"]:
        parts.append("The final student has learned the validation rows too, on which it can no longer be measured")
    return ". ".join(parts)


def with_noise(training: TrainConfig, student: Path) -> TrainConfig:
    """Add the noise that suits the input, where the configuration has none: dropped words, shifted images, none for numbers."""
    loaded, augment = load_student(student), training.augment
    shape, reads = loaded.input_shape, loaded.config.input
    changes: dict[str, Any] = {}
    if reads.kind in TEXTS and not augment.word_dropout:
        changes["word_dropout"] = WORDS
    if loaded.config.kind in ("cnn", "resnet") and len(shape) == 3 and not augment.crop:
        changes["crop"] = min(shape[1:]) // SHIFT
    return training.model_copy(update={"augment": augment.model_copy(update=changes)})


def parts_of(final: FinalTraining) -> list[tuple[str, Path, Any]]:
    """List the parts of a last training: title, what its presence says that it is done, and what does it."""
    training = final.run.config.training
    parts: list[tuple[str, Path, Any]] = []
    if training.self_training:
        parts += [
            (
                f"final: train student {number + 1} of an ensemble of {training.ensemble}",
                final.where / "members" / f"seed={number:03d}",
                partial(final.train_member, number),
            )
            for number in range(1, training.ensemble)
        ]
        parts += [
            ("final: pseudo-labels", final.run.directory.summary(final.pseudo), final.label),
            ("final: try the pseudo-labels", final.gate, final.judge),
        ]
    return [*parts, ("final: the last training", final.done, final.learn)]
