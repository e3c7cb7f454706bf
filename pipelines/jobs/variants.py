"""A run's other students: of other settings than its own, on the labels that the run has bought.

    run/variants/mlp-3f2a91c0/   laid out like a run
      config.toml                 the settings of [student] and [training] that the name is a hash of
      students/round=003/         learned from the labels that the run's own student chose
      report/, exports/, tune/, pareto/
      selected/, labels/          of further rounds, which this student chooses itself

Labels, the teacher's answers and what was chosen are the run's; whoever chose a round stays named as its chooser. Nothing is
asked again, and the run goes on with its own student as if nobody had been beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilbeam.pipelines.config import differing_keys
from distilbeam.pipelines.jobs.directory import VARIANTS, RunDirectory
from distilbeam.pipelines.jobs.weak_teacher import learns_pooled
from distilbeam.student.training.config import FREE, LAST

if TYPE_CHECKING:
    from distilbeam.pipelines.pool.datasets import Inputs


class VariantDirectory(RunDirectory):
    """The paths of another student of a run.

    Args:
      root: its own directory.
      run: the run whose labels it learns from.
      differing: settings in which it differs from the run's student, with both values.
      own_from: first round that is its own; without it the first that it has chosen, or that the run has no labels of.
    """

    def __init__(
        self, root: Path, run: RunDirectory, differing: tuple[str, ...] = (), own_from: int | None = None
    ) -> None:
        super().__init__(root)
        self.run, self.differing, self._own_from = run, differing, own_from

    @property
    def own_from(self) -> int:
        """The first round that is not the run's."""
        if self._own_from is not None:
            return self._own_from
        number = 0
        while not self._is_own(number) and self.run.summary(self.run.labels(number)).exists():
            number += 1
        return number

    @property
    def top(self) -> Path:
        """The directory of the whole run."""
        return self.run.top

    @property
    def frozen(self) -> Path:
        """What the run was started with."""
        return self.run.frozen

    @property
    def work(self) -> Path:
        """What the phases of the run cost, this student's among them."""
        return self.run.work

    @property
    def calibration(self) -> Path:
        """The teacher's temperature."""
        return self.run.calibration

    @property
    def standing(self) -> Path:
        """Teacher and the run's student 0, compared."""
        return self.run.standing

    def uniform_with(self, labels: int) -> RunDirectory:
        """The comparison with so many uniformly chosen labels, which are the run's."""
        of_run = self.run.uniform_with(labels)
        return VariantDirectory(self.root / of_run.root.name, of_run, own_from=1)

    def asked(self, name: str) -> Path:
        """Directory of the teacher's answers for a labelled set."""
        return self.run.asked(name)

    def selected(self, number: int) -> Path:
        """Directory of a round's plan, gains and picks."""
        return self.run.selected(number) if number < self.own_from else super().selected(number)

    def labels(self, number: int) -> Path:
        """Soft-label dataset of a round."""
        return self.run.labels(number) if number < self.own_from else super().labels(number)

    def chooser(self, number: int) -> Path:
        """Checkpoint of the student that chose a round."""
        return self.run.chooser(number) if number < self.own_from else super().chooser(number)

    def dead_letters(self, name: str) -> Path:
        """Directory of the rows that could not be labelled."""
        number = name.removeprefix("round=")
        is_own = number.isdigit() and int(number) >= self.own_from
        return super().dead_letters(name) if is_own else self.run.dead_letters(name)

    def trained(self, rounds: int) -> list[int]:
        """Numbers of the students: those that choose, and the last; nobody needs another one's intermediate students."""
        return list(range(min(self.own_from, rounds), rounds + 1))

    def beside(self, rounds: int) -> Path | None:
        """Checkpoint of the run's own student after so many rounds, if it has one."""
        student = self.run.student(rounds)
        return student if student.exists() else None

    def suited(self, inputs: Inputs) -> Inputs:
        """Give the data the columns that the run's labels carry; see `RunDirectory.suited`."""
        former = self.run.stored_config()
        carried = tuple(dict.fromkeys([*_columns(former["student"]["input"]), *former["data"].get("carry", [])]))
        missing = [column for column in inputs.student_columns if column not in carried]
        if missing:
            raise ValueError(
                f"student.input.columns must be among the columns {', '.join(carried)} that the labels of {self.top} carry, "
                f"got {missing[0]}; choose another run.directory, with {missing[0]} in data.carry for further students"
            )
        return replace(inputs, carried=carried)

    def sentence(self, rounds: int) -> str:
        """Say whose students these are and what they learn from."""
        there = self.own_from
        learned = (
            f"{there} round(s) that are there" if rounds >= there else f"first {rounds} of {there} rounds (run.rounds)"
        )
        more = f", then chooses for {rounds - there} more" if rounds > there else ""
        return (
            f"Another student than that of {self.top}: {'; '.join(self.differing)}. It learns from the labels of the "
            f"{learned}{more}; what it becomes is in {self.root}"
        )

    def _is_own(self, number: int) -> bool:
        return RunDirectory(self.root).selected(number).exists()


def placed(run: RunDirectory, former: Mapping[str, Any], now: Mapping[str, Any]) -> RunDirectory:
    """Give the run's directory where the student is the run's own, else that of the other student.

    Args:
      run: the run.
      former: its resolved configuration.
      now: the resolved configuration that is asked for.
    """
    own, other = _learning(former, run), _learning(now, run)
    differing = differing_keys(own, other)
    if not differing:
        return run
    digest = hashlib.blake2b(json.dumps(other, sort_keys=True).encode(), digest_size=4).hexdigest()
    kind = other["student"]["kind"].replace(":", ".")
    return VariantDirectory(run.root / VARIANTS / f"{kind}-{digest}", run, tuple(differing))


def _learning(config: Mapping[str, Any], run: RunDirectory) -> dict[str, Any]:
    """The settings that decide what a student becomes on given labels, and nothing else."""
    training = {name: value for name, value in config.get("training", {}).items() if name not in (*FREE, *LAST)}
    return {
        "student": dict(config["student"]),
        "training": training,
        "labels": {"pooled": learns_pooled(config.get("labels", {}).get("pooled", False), run)},
    }


def _columns(reading: Mapping[str, Any]) -> list[str]:
    return list(reading["columns"])
