"""The last training of a run, where nothing is learned of the validation rows: they judge what the un-bought rows are worth.

    members/seed=00K/    students that are trained like the kept one, with other seeds; it is the first member itself
    pseudo/              their soft labels for rows of the pool that were not bought, a dataset of its own
    candidate/           a student that learns these too; where it is not better on the validation set, they are left out
    gate.json            whether they are learned
    final.json           what came of it

in run/final/round=NNN-DIGEST, with the digest of the settings. The teacher is not asked, and every part is committed like a run's
other steps: a killed call goes on with the part that is missing. Where the validation rows are learned as well, it is
`cross_fitting` that is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distilbeam.pipelines.jobs.final_result import final_directory
from distilbeam.pipelines.jobs.kept_student import kept_round
from distilbeam.pipelines.jobs.run import Run
from distilbeam.pipelines.labelling.pseudo_labels import PseudoLabel, mean_logprobs, pseudo_spec
from distilbeam.progress import Progress
from distilbeam.selection.trust.calibration import fit_temperature
from distilbeam.storage.files import read_json, write_json
from distilbeam.student.checkpoint import load_student
from distilbeam.student.evaluation.metrics import evaluate
from distilbeam.student.training.batches import TEXTS
from distilbeam.student.training.config import TrainConfig
from distilbeam.student.trust import trusted
from distilbeam.teacher.softlabels import read_manifest

if TYPE_CHECKING:
    from distilbeam.pipelines.jobs.recorded_phases import RecordedPhases

WORDS = 0.2  # share of the words that a student of pseudo-labels does not see; study 7
SHIFT = 8  # an eighth of an image's side is the most that it is shifted

Part = tuple[str, Path, Any]  # title, what its presence says that it is done, and what does it


class FinalTraining:
    """The last training, part by part.

    Args:
      run: the run.
      phases: carries the pseudo-label phase out; not needed to look at what is done.
    """

    def __init__(self, run: Run, phases: RecordedPhases | None = None) -> None:
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

    def parts(self) -> list[Part]:
        """List what is to be done."""
        members = self.run.config.training.ensemble
        return [
            *(
                (f"final: train student {n + 1} of {members}", self._other_member(n), partial(self.train_member, n))
                for n in range(1, members)
            ),
            ("final: pseudo-labels", self.run.directory.summary(self.pseudo), self.label),
            ("final: try the pseudo-labels", self.gate, self.judge),
            ("final: the last training", self.done, self.learn),
        ]

    def train_member(self, number: int, progress: Progress) -> None:
        """Train a member of the ensemble: the kept student with another seed."""
        self.run.train(self.member(number), self.bought, progress, seed=self.seed(number))

    def label(self, progress: Progress) -> None:
        """Give soft labels to rows that were not bought, by the phase; a phase that was killed goes on."""
        members = [self.member(number) for number in range(self.run.config.training.ensemble)]
        said = mean_logprobs([self.run.student_logits(member, "validation") for member in members])
        temperature = fit_temperature(said, self.run.truth("validation")).temperature
        rows = self.give_labels(self.pseudo, members, temperature, progress)
        figures = {"rows": rows, "temperature": temperature, "members": len(members), **self.judged(said)}
        write_json(self.run.directory.summary(self.pseudo), figures)

    def judge(self, progress: Progress) -> None:
        """Train a student that learns them too, and keep them only where it is better on the validation set.

        Better is: more rows right, or as many with a smaller loss. Neither student has learned these rows.
        """
        there = read_json(self.run.directory.summary(self.pseudo))
        before = self.judged(self.run.student_logits(self.member(0), "validation"))
        figures: dict[str, Any] = {"ensemble": there, "before": before, "kept": False}
        if there["rows"]:
            if not self._candidate.exists():
                training = with_noise(self.run.config.training, self.member(0))
                self.run.train(self._candidate, self.bought, progress, training=training, pseudo_labels=[self.pseudo])
            after = self.judged(self.run.student_logits(self._candidate, "validation"))
            better = (after["accuracy"], -after["nll"]) > (before["accuracy"], -before["nll"])
            figures |= {"after": after, "kept": better}
        write_json(self.gate, figures)

    def learn(self, progress: Progress) -> None:  # noqa: ARG002 - the signature of a part
        """Say which student is the last one: that of the last round, or the one that learned pseudo-labels too."""
        self.say(self._candidate if read_json(self.gate)["kept"] else None)

    # what both forms of the last training share

    @property
    def bought(self) -> list[Path]:
        """The soft labels that the kept student has learned."""
        return self.run.soft_labels[: self.kept]

    def seed(self, number: int) -> int:
        """Give the seed of a member."""
        return self.run.config.run.seed + 1000 * number

    def give_labels(
        self, output: Path, members: Sequence[Path], temperature: float, progress: Progress, each: bool = False
    ) -> int:
        """Carry the phase out; return how many rows have a pseudo-label. With `each` the temperature is every member's own."""
        run, config = self.run, self.run.config
        picked: int = sum(read_manifest(run.directory.labels(r)).rows for r in range(config.run.rounds))
        spec = read_manifest(self.bought[0]).spec if self.bought else run.label_spec
        work = PseudoLabel(
            students=tuple(map(str, members)),
            spec=pseudo_spec(spec, [load_student(member).fingerprint() for member in members], temperature),
            output=str(output),
            bought=tuple(str(run.directory.picks(r)) for r in range(config.run.rounds)),
            share=min(1.0, config.training.pseudo_rows / max(run.inputs.pool.rows - picked, 1)),
            seed=config.run.seed,
            columns=run.inputs.student_columns,
            id_column=config.data.id,
            batch_rows=config.engine.batch_rows,
            each=each,
            trust=trusted(),
        )
        assert self.phases is not None
        self.phases.carry_out("pseudo", work, run.inputs.pool.units, progress)
        rows: int = read_manifest(output).rows if any(output.glob("*.parquet")) else 0
        return rows

    def judged(self, logits: npt.NDArray[np.floating]) -> dict[str, float]:
        """Measure logits on the validation rows."""
        found = evaluate(np.asarray(logits, np.float32), self.run.truth("validation"))
        return {name: found[name] for name in ("accuracy", "nll")}

    def say(self, student: Path | None, **figures: Any) -> None:
        """Write down what came of it."""
        gate = {"gate": read_json(self.gate)} if self.gate.exists() else {}
        kept = bool(gate and gate["gate"]["kept"])
        found = {"student": None if student is None else student.name, "kept_round": self.kept, "pseudo_labels": kept}
        write_json(self.done, found | {"validation_rows": False} | figures | gate)

    def _other_member(self, number: int) -> Path:
        """Directory of a member that is not the kept student, which a plan may ask for before there is one."""
        return self.where / "members" / f"seed={number:03d}"

    @property
    def _candidate(self) -> Path:
        return self.where / "candidate"


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
