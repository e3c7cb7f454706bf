"""PTransforms for people who have a pipeline of their own: the functions of a run, without a run directory.

Both take and give Arrow record batches, bounded or not. `LabelExamples` is one linear step; `select_examples.SelectExamples`
and `write_soft_labels.WriteSoftLabels` work per window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics import Metrics

from distilbeam.pipelines.engine.model_cache import teacher_text
from distilbeam.pipelines.engine.phase import threads
from distilbeam.pipelines.labelling.label_quality import Estimates
from distilbeam.pipelines.labelling.label_rows import Labelling
from distilbeam.pipelines.pool.reserved_names import require_free_for_labelling, require_free_names
from distilbeam.pipelines.transforms.beam_files import write_parquet_anywhere
from distilbeam.student.trust import trusted
from distilbeam.teacher.config import TeacherConfig, parse_teacher_config
from distilbeam.teacher.softlabels import SoftLabelSpec


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
      dead_letters: directory, or place in an object store, for a Parquet file per batch of the rows that the teacher cannot answer. Without it such a
        row fails the batch: no row disappears silently.
      trust: modules whose code the student may call, besides what this process trusts; see `student.trust`.

    Raises:
      ValueError: estimates without a student, or the other way round; a teacher configuration that is not valid; a
        carried column that has a name of ours.
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
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if (estimates is None) != (student is None):
            raise ValueError("estimates and student must be given together: the weights depend on both")
        config = parse_teacher_config(dict(teacher)) if isinstance(teacher, Mapping) else teacher
        require_free_for_labelling(spec.carried, config.input.columns, id_column, "spec.carried")
        if estimates is not None:
            require_free_names(spec.carried, "spec.carried")
        self.labelling = Labelling(
            teacher=teacher_text(config.relative_to(Path(base).resolve()), spec.classes),
            spec=spec,
            id_column=id_column,
            teacher_batch=teacher_batch,
            estimates=None if estimates is None else estimates.to_text(),
            student=None if student is None else str(student),
            trust=(*trusted(), *trust),
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
        write_parquet_anywhere(self.dead_letters, f"{name}.parquet", table)
