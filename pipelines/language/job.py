"""The steps of a run of a language model: first student, ask about held-out blocks, select, label, train, compare.

What `jobs/distillation.py` is to runs of classifiers: every step reads committed files and commits files. The first round of a
student with random weights is chosen by chance, for such a student knows nothing of the blocks.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from apache_beam.options.pipeline_options import PipelineOptions

from distilbeam.inputs.blocks import BLOCK_COLUMNS
from distilbeam.pipelines.acquisition.score import Candidates
from distilbeam.pipelines.acquisition.score_blocks import ScoreBlocks, arrays_of
from distilbeam.pipelines.acquisition.select import Choice, choose
from distilbeam.pipelines.acquisition.unusable_rows import gather_unusable, unusable_list, unusable_sentence
from distilbeam.pipelines.engine.model_cache import cached_teacher
from distilbeam.pipelines.jobs.blocks import COLUMNS, ID
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.jobs.label_step import LabelStep
from distilbeam.pipelines.jobs.recorded_phases import RecordedPhases
from distilbeam.pipelines.labelling.label_rows import Labelling
from distilbeam.pipelines.labelling.phase import Label
from distilbeam.pipelines.labelling.teacher_answers import count_dead_letters
from distilbeam.pipelines.language.run import POOL, TokenRun
from distilbeam.pipelines.pool.read_splits import BATCH_BYTES
from distilbeam.progress import Progress
from distilbeam.student.language.scoring import score_blocks
from distilbeam.student.trust import trusted
from distilbeam.teacher.backends.torch import find_device
from distilbeam.teacher.softlabels import read_manifest

log = logging.getLogger(__name__)
VECTOR_BYTES = 2**30  # of the candidates' vectors, which the driver holds together
_BLOCK_BYTES = 4 + 2 + 1  # of a token in the pool


class TokenJob:
    """Carries out the steps of a run of a language model.

    Args:
      run: the run; its directory is held by this process.
      options: Beam's options for the phases.
    """

    def __init__(self, run: TokenRun, options: PipelineOptions) -> None:
        self.run, self.config, self.directory, self.options = run, run.config, run.directory, options
        self.phases = RecordedPhases(run.directory, run.config.engine, options)

    def reopen_failed(self) -> None:
        """Let the teacher be asked again about blocks that had no answer, as long as nothing was made of their labels."""
        where = self.directory
        used = {f"ask-{name}": (where.asked(name), where.student(1)) for name in ("validation", "test")}
        used |= {f"round={r:03d}": (where.labels(r), where.student(r + 1)) for r in range(self.config.run.rounds)}
        for name, (dataset, made) in used.items():
            failed = where.summary(dataset).exists() and count_dead_letters(where.dead_letters(name))
            if failed and not made.exists():
                where.summary(dataset).unlink()

    def train(self, number: int, progress: Progress) -> None:
        """Train the student on the labels of the first `number` rounds; student 0 is the one that training begins with."""
        where = self.directory
        if number:
            self.run.train(where.student(number), [where.labels(r) for r in range(number)], progress)
        else:
            self.run.write_first(where.student(0))

    def train_plain(self, progress: Progress) -> None:
        """Train the same student on the text alone of all blocks that were bought."""
        where, rounds = self.directory, self.config.run.rounds
        labels = [where.labels(r) for r in range(rounds)]
        self.run.train(self.run.plain.student(rounds), labels, progress, hard_share=1.0)

    def ask(self, name: str, progress: Progress) -> None:
        """Ask the teacher about held-out blocks.

        Raises:
          TeacherMisfit: a server allows fewer classes than the pool's labels have, which is known before anything is paid.
        """
        labels = self.config.labels
        if (labels.k or 0) > labels.held_out_k and self.config.teacher.kind != "causal_lm":
            answering: Any = cached_teacher(self.run.teacher())
            answering.try_form()
        plan = self.run.inputs.held_out[name]
        work = self.label_work(name, self.directory.asked(name), f"ask-{name}", None)
        self._step.carry_out(work, plan.units, self.directory.asked(name), progress)

    def select(self, number: int, progress: Progress) -> None:
        """Score the blocks that nobody has labelled with the current student, and choose."""
        choice, units = self._choice_of_round(number), self.run.inputs.pool.units
        if choice.scored is not None:
            score = self.score_work(self.directory.student(number), choice.gains, choice.bought)
            left = self.run.inputs.pool.rows - choice.budget * number
            score = replace(score, gain=choice.scored, candidates=self._candidates(choice, left))
            self.phases.carry_out("score", score, units, progress)
            if unusable := gather_unusable(choice.gains, units):
                log.warning(unusable_sentence(unusable, unusable_list(choice.gains)))
        choose(choice)

    def label(self, number: int, progress: Progress) -> None:
        """Ask the teacher about the blocks that a round chose."""
        where = self.directory
        work = self.label_work(POOL, where.labels(number), f"round={number:03d}", where.picks(number))
        self._step.carry_out(work, self.run.inputs.pool.units, where.labels(number), progress)

    def compare(self, progress: Progress) -> None:
        """Train the same student on as many uniformly chosen blocks; what was bought already is not asked again."""
        where, rounds = self.run.comparison, self.config.run.rounds
        if not where.summary(where.labels(0)).exists():
            choice = self._choice(where, 0, "uniform", self.run.inputs.budget * rounds, (), rounds, {})
            choose(choice)
            work = self.label_work(POOL, where.labels(0), where.root.name, choice.picks)
            self._step.carry_out(work, self.run.inputs.pool.units, where.labels(0), progress)
        self.run.train(where.student(1), [where.labels(0)], progress)

    def label_work(self, blocks: str, output: Path, name: str, picks: Path | None) -> Label:
        """Return the label phase's work.

        Args:
          blocks: `pool` or the name of a held-out set.
          output: directory of the dataset.
          name: of its dead letters.
          picks: directory of what was chosen; None for all.
        """
        spec, engine = self.run.spec(blocks), self.config.engine
        labelling = Labelling(
            self.run.teacher(blocks),
            spec,
            id_column=ID,
            teacher_batch=self.run.blocks(blocks).rows_at_once(spec),
            reuse=self._bought_elsewhere(output) if blocks == POOL else (),
        )
        return Label(
            labelling=labelling,
            output=str(output),
            dead_letters=str(self.directory.dead_letters(name)),
            columns=COLUMNS,
            picks=None if picks is None else str(picks),
            batch_rows=engine.batch_rows,
            max_failures=engine.max_failures,
            flush_s=engine.flush_s,
            retry=engine.retry,
        )

    def score_work(self, student: Path, gains: Path, bought: tuple[str, ...] = ()) -> ScoreBlocks:
        """Return the score phase's work with a student, into a given directory."""
        return ScoreBlocks(
            student=str(student),
            gain=self.config.selection.scored or self.config.selection.gain,
            output=str(gains),
            bought=bought,
            num_classes=self.run.spec().num_classes,
            batch_rows=self._batch_rows,
            device=self.config.training.device,
            trust=trusted(),
        )

    @property
    def sampled(self) -> Path:
        """Labels of the samples of `plan`, which no round asks again."""
        return self.directory.root / "sampled"

    @property
    def _step(self) -> LabelStep:
        return LabelStep(self.directory, self.config.engine, self.phases)

    @property
    def _batch_rows(self) -> int:
        return max(1, min(self.config.engine.batch_rows, BATCH_BYTES // (_BLOCK_BYTES * self.run.inputs.length)))

    def _bought_elsewhere(self, output: Path) -> tuple[str, ...]:
        """List the datasets of pool blocks, but for one, that are there: rounds, comparisons and samples."""
        datasets = [dataset for dataset in self.directory.bought_elsewhere(0) if dataset != output]
        return tuple(map(str, [*datasets, *([self.sampled] if self.sampled.exists() else [])]))

    def _candidates(self, choice: Choice, left: int) -> Candidates | None:
        """Say whose vectors are kept; fewer than `Choice` would, where they are wide."""
        candidates = choice.candidates(left)
        if candidates is None:
            return None
        head: Any = self.run.language_model(self.directory.student(choice.round)).network.head
        width = int(head.weight.shape[1])
        most = max(VECTOR_BYTES // (4 * width), 2 * choice.budget)
        return replace(candidates, share=min(candidates.share, most / left))

    def _choice_of_round(self, number: int) -> Choice:
        bought = tuple(str(self.directory.picks(r)) for r in range(number))
        blind = number == 0 and not self.config.scores_at_first
        method = "uniform" if blind else self.config.selection.method
        digest = self.run.chooser_digest(self.directory.student(number))
        choice = self._choice(
            self.directory, number, method, self.run.inputs.budget, bought, number, {"student": digest}
        )
        return replace(choice, labelled=partial(self._labelled_vectors, number) if number else None)

    def _labelled_vectors(self, number: int) -> npt.NDArray[np.float32]:
        """Compute what the student of a round makes of all blocks that were bought before."""
        model = self.run.language_model(self.directory.student(number))
        device = find_device(self.run.device, "training.device")
        gain = self.config.selection.scored or self.config.selection.gain
        parts = []
        for r in range(number):
            for path in read_manifest(self.directory.labels(r)).paths():
                for batch in pq.ParquetFile(path).iter_batches(self._batch_rows, columns=list(BLOCK_COLUMNS)):
                    said = score_blocks(model.network, arrays_of(batch), gain, model.num_classes, device)
                    parts.append(said.embeddings[~np.isnan(said.gains)])
        return np.concatenate(parts)

    def _choice(
        self,
        where: RunDirectory,
        place: int,
        method: str,
        budget: int,
        bought: tuple[str, ...],
        number: int,
        digests: dict[str, str],
    ) -> Choice:
        return Choice(
            pool=self.run.inputs.pool,
            directory=where.selected(place),
            method=method,
            budget=budget,
            wrong_share=0.0,
            bought=bought,
            seed=self.config.run.seed,
            round=number,
            digests={"pool": self.run.inputs.pool.digest, "teacher": self.run.fingerprint, **digests},
            gain=self.config.selection.gain,
        )
