"""The phases of a job: carried out with the job's settings, what each cost added to the job's work log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.pipelines.engine.phase import PhaseReport, run_phase
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.work_log import add_work, with_counts_of
from distilbeam.pipelines.sections import EngineSection
from distilbeam.progress import Progress
from distilbeam.storage.stores import store_of


@dataclass(frozen=True)
class RecordedPhases:
    """Carries out phases of a run, a labelling job or a watched directory.

    Attributes:
      directory: the run directory, which has the errors and the work log.
      engine: how many attempts there are.
      options: Beam's options.
    """

    directory: RunDirectory
    engine: EngineSection
    options: PipelineOptions

    def carry_out(
        self, name: str, work: Any, items: Sequence[Any], progress: Progress, *, labels: Path | None = None
    ) -> PhaseReport:
        """Do the work for every item whose file is missing.

        Args:
          name: the phase, "label", "score", "check", "pseudo" or "encode".
          work: what to do with an item.
          items: all items of the phase.
          progress: told the rows done and all rows.
          labels: the dataset that a label phase fills; its manifest has the counts where the runner keeps none.

        Returns:
          What it cost.

        Raises:
          PhaseError: work that failed in every attempt.
        """
        done = run_phase(
            name,
            work,
            items,
            errors=self.directory.errors(name),
            options=self.options,
            progress=progress,
            attempts=self.engine.attempts,
            poll_s=store_of(self.directory.root).look_s,
            engine_log=self.directory.engine_log,
        )
        add_work(self.directory.work, name, done if labels is None else with_counts_of(done, labels, items))
        return done
