"""The step of a run that asks the teacher about a set or a choice: shards are planned, labelled, and summed up at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.recorded_phases import RecordedPhases
from distilbeam.pipelines.labelling.dead_letters import ask_again, drop_answered, leave, none_answered_sentence
from distilbeam.pipelines.labelling.phase import Label
from distilbeam.pipelines.labelling.shard_plan import Task, plan_shards
from distilbeam.pipelines.labelling.teacher_answers import count_dead_letters, tally
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.pipelines.sections import EngineSection
from distilbeam.progress import Progress
from distilbeam.storage.files import write_json
from distilbeam.teacher.softlabels import committed


@dataclass(frozen=True)
class LabelStep:
    """Labels rows of a run.

    Attributes:
      directory: the run directory, held by this process.
      engine: how the work is cut.
      phases: carries the phase out.
    """

    directory: RunDirectory
    engine: EngineSection
    phases: RecordedPhases

    def carry_out(self, work: Label, units: Sequence[Unit], output: Path, progress: Progress) -> None:
        """Label all that has no label yet, and write the dataset's summary.

        Args:
          work: the phase's work; it says which rows of the units are chosen.
          units: of the pool, or of the set that is asked about.
          output: directory of the dataset.
          progress: told the rows done and all rows.

        Raises:
          ValueError: the teacher answered none of the rows.
          PhaseError: work that failed in every attempt.
        """
        spec, dead_letters = work.labelling.spec, Path(work.dead_letters)
        tasks = plan_shards(units, work.picks, self.engine.shard_rows, spec, self.engine.shard_bytes)
        again = self._again(work, units, committed(output))
        self.phases.carry_out("label", work, [*tasks, *again], progress, labels=output)
        drop_answered(dead_letters, committed(output))
        failed = count_dead_letters(dead_letters)
        if failed == sum(task.rows for task in tasks):
            raise ValueError(none_answered_sentence(dead_letters, failed))
        write_json(self.directory.summary(output), tally(output, failed))

    def _again(self, work: Label, units: Sequence[Unit], done: set[str]) -> list[Task]:
        """Plan to ask again about the rows that failed, unless they are to be left."""
        dead_letters = Path(work.dead_letters)
        if self.engine.retry:
            return ask_again(dead_letters, units, work.picks, self.engine.shard_rows, work.labelling.spec, done)
        leave(dead_letters, done)
        return []
