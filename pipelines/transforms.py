"""PTransforms for people who have a pipeline of their own: the functions of a run, without a run directory.

Both take and give Arrow record batches. `LabelExamples` is one linear step. `SelectExamples` works per window: only gains
meet at one worker, where the game is solved and rounded; each batch then meets its own decision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.transforms.window import GlobalWindow

from distilbeam.pipelines.estimates import Estimates
from distilbeam.pipelines.files import write_parquet
from distilbeam.pipelines.labelling import Labelling
from distilbeam.pipelines.models import cached_student, teacher_text
from distilbeam.pipelines.phases import threads
from distilbeam.pipelines.score import GAINS
from distilbeam.selection.rad import rad_marginals
from distilbeam.selection.rounding import dep_round, shard_rng
from distilbeam.teacher.config import TeacherConfig, parse_teacher_config
from distilbeam.teacher.softlabels import SoftLabelSpec

_Gains = npt.NDArray[np.float64]


class LabelExamples(beam.PTransform):
    """Turn record batches of examples into record batches of soft labels.

    Args:
      teacher: the teacher's configuration, or the section `[teacher]` as plain data.
      spec: what is stored; its `teacher` must be the teacher's fingerprint, its `carried` columns are copied.
      id_column: column with the examples' ids; the hash of the carried columns without one.
      base: directory that the teacher's relative paths are relative to.
      teacher_batch: most rows in one request.
      estimates: fitted estimates, to attach `alpha`, `candidates` and `weight`; needs `student`.
      student: directory of the student whose logits the weights need.
      dead_letters: directory for a Parquet file per batch of the rows that the teacher cannot answer. Without it such a
        row fails the batch: no row disappears silently.

    Raises:
      ValueError: estimates without a student, or the other way round; a teacher configuration that is not valid.
    """

    def __init__(
        self,
        teacher: TeacherConfig | Mapping[str, Any],
        spec: SoftLabelSpec,
        *,
        id_column: str | None = None,
        base: str | Path = ".",
        teacher_batch: int = 256,
        estimates: Estimates | None = None,
        student: str | Path | None = None,
        dead_letters: str | Path | None = None,
    ) -> None:
        super().__init__()
        if (estimates is None) != (student is None):
            raise ValueError("estimates and student must be given together: the weights depend on both")
        config = parse_teacher_config(dict(teacher)) if isinstance(teacher, Mapping) else teacher
        self.labelling = Labelling(
            teacher=teacher_text(config, Path(base).resolve()),
            spec=spec,
            id_column=id_column,
            teacher_batch=teacher_batch,
            estimates=None if estimates is None else estimates.to_text(),
            student=None if student is None else str(student),
        )
        self.dead_letters = None if dead_letters is None else str(dead_letters)

    def expand(self, batches: Any) -> Any:
        return batches | "Label" >> beam.ParDo(_LabelBatch(self.labelling, self.dead_letters))


class _LabelBatch(beam.DoFn):
    def __init__(self, labelling: Labelling, dead_letters: str | None) -> None:
        self.labelling, self.dead_letters = labelling, dead_letters
        self.counters = {name: Metrics.counter("LabelExamples", name) for name in ("rows", "calls", "failed")}

    def process(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        with threads(1):
            labelled = self.labelling(pa.Table.from_batches([batch]))
        if labelled.failures:
            self._keep(labelled.failures)
        for name, count in zip(
            self.counters, (labelled.table.num_rows, labelled.calls, len(labelled.failures)), strict=True
        ):
            self.counters[name].inc(count)
        yield from labelled.table.combine_chunks().to_batches()

    def _keep(self, failures: list[dict[str, Any]]) -> None:
        if self.dead_letters is None:
            first = failures[0]
            raise ValueError(
                f"{len(failures)} row(s) have no label, the first {first['example_id']!r}: {first['error']}; "
                "give LabelExamples a directory for dead_letters to go on without them"
            )
        table = pa.Table.from_pylist(failures)
        name = hashlib.blake2b(repr(failures).encode(), digest_size=8).hexdigest()
        write_parquet(Path(self.dead_letters) / f"{name}.parquet", table)


class SelectExamples(beam.PTransform):
    """Choose exactly `budget` examples of each window by Robust Active Distillation (arXiv 2210.01213).

    A window with fewer examples is chosen whole. The chosen rows come out in their batches, with two more columns: `gain`
    and `inclusion_probability` (float32). A repeated bundle chooses the same rows: the generator is seeded by `seed` and
    the window.

    Args:
      student: directory of the student that scores the examples.
      budget: examples to choose in each window.
      wrong_share: expected share of wrong teacher labels, in [0, 1]: one minus its accuracy on a validation set.
      gain: "margin", "entropy" or "least_confidence".
      seed: of the rounding.

    Raises:
      ValueError: an argument is out of range.
    """

    def __init__(
        self, student: str | Path, budget: int, *, wrong_share: float, gain: str = "margin", seed: int = 0
    ) -> None:
        super().__init__()
        if budget < 1:
            raise ValueError(f"budget must be at least 1, got {budget}")
        if not 0 <= wrong_share <= 1:
            raise ValueError(f"wrong_share must be between 0 and 1, got {wrong_share}")
        if gain not in GAINS:
            raise ValueError(f"gain must be one of {', '.join(GAINS)}, got {gain!r}")
        self.student, self.budget, self.wrong_share, self.gain, self.seed = (
            str(student),
            budget,
            wrong_share,
            gain,
            seed,
        )

    def expand(self, batches: Any) -> Any:
        scored = batches | "Score" >> beam.ParDo(_ScoreBatch(self.student, self.gain))
        decisions = (
            scored
            | "GainsOnly" >> beam.Map(lambda item: (None, (item[0], item[1][1])))
            | "MeetPerWindow" >> beam.GroupByKey()
            | "SolveAndRound" >> beam.ParDo(_Decide(self.budget, self.wrong_share, self.seed))
        )
        return (
            {"batches": scored, "decisions": decisions}
            | "MeetDecision" >> beam.CoGroupByKey()
            | "TakeChosen" >> beam.FlatMap(_take_chosen)
        )


class _ScoreBatch(beam.DoFn):
    def __init__(self, student: str, gain: str) -> None:
        self.student, self.gain = student, gain

    def process(self, batch: pa.RecordBatch) -> Iterator[tuple[str, tuple[pa.RecordBatch, _Gains]]]:
        if batch.num_rows:
            with threads(1):
                gains = GAINS[self.gain](cached_student(self.student).logits(batch))
            yield _batch_id(batch), (batch, gains)


class _Decide(beam.DoFn):
    def __init__(self, budget: int, wrong_share: float, seed: int) -> None:
        self.budget, self.wrong_share, self.seed = budget, wrong_share, seed

    def process(
        self, element: tuple[None, Iterable[tuple[str, _Gains]]], window: Any = beam.DoFn.WindowParam
    ) -> Iterator[tuple[str, tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]]]:
        scored = sorted(element[1], key=lambda item: item[0])  # runners group in any order
        gains = np.concatenate([g for _, g in scored])
        budget = min(self.budget, len(gains))
        marginals = rad_marginals(gains, self.wrong_share * len(gains), budget).probabilities
        chosen = dep_round(marginals, shard_rng(self.seed, 0, _window_name(window)))
        start = 0
        for batch_id, g in scored:
            here = slice(start, start + len(g))
            yield batch_id, (chosen[here], marginals[here])
            start += len(g)


def _take_chosen(item: tuple[str, Mapping[str, Iterable[Any]]]) -> Iterator[pa.RecordBatch]:
    # Batches of equal content share an id and have equal gains, so that any of them may take any of their decisions.
    for (batch, gains), (chosen, marginals) in zip(item[1]["batches"], item[1]["decisions"], strict=True):
        if chosen.any():
            extra = {"gain": gains[chosen], "inclusion_probability": marginals[chosen]}
            taken = batch.filter(pa.array(chosen))
            for name, values in extra.items():
                taken = taken.append_column(name, pa.array(values.astype(np.float32)))
            yield taken


def _batch_id(batch: pa.RecordBatch) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return hashlib.blake2b(sink.getvalue(), digest_size=16).hexdigest()


def _window_name(window: Any) -> str:
    return "global" if isinstance(window, GlobalWindow) else f"{window.start}-{window.end}"
