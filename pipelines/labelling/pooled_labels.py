"""Soft labels that pool the teacher's beliefs with those of the student that chose the examples.

They are made from stored labels, of which none changes: what was paid for stays what the teacher said, and can be learned
from as such at any time. The weights of the pool are fitted on the validation set (`selection.pooling`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.engine.model_cache import cached_student
from distilbeam.selection.trust.pooling import BeliefPool
from distilbeam.storage.files import write_json
from distilbeam.teacher.softlabels import SoftLabelSpec, decode, encode, entry_path, read_manifest, write_shard

OF_THE_TEACHER = ("alpha", "candidates", "weight")  # estimates of how far to trust its labels, which these are not


def pool_labels(source: Path, target: Path, student: Path, beliefs: BeliefPool) -> None:
    """Make a dataset of pooled labels, or what is left of it.

    A shard of the new dataset has the name, the key and the rows of one of the old; its manifest entry says which file it
    was made from and with which weights. `is_pooled` is true when all of them are there.

    Args:
      source: dense soft labels, with the columns that the student reads.
      target: directory of the new dataset.
      student: checkpoint of the student that chose the examples, and was not trained on them.
      beliefs: the weights.

    Raises:
      ValueError: the labels are not dense.
    """
    found = read_manifest(source)
    if found.spec.kind != "dense":
        raise ValueError(f"labels to be pooled must be dense, those in {source} are {found.spec.kind}")
    spec = pooled_spec(found.spec)
    for path, entry in zip(found.paths(), found.entries, strict=True):
        if not entry_path(target, entry.key).exists():
            table = pq.read_table(path, page_checksum_verification=True)
            about = {"pooled_from": entry.checksum, "beliefs": beliefs.to_json()}
            write_shard(target, path.stem, _pooled(table, found.spec, spec, student, beliefs), spec, entry.key, about)
    write_json(_done(target), beliefs.to_json())


def is_pooled(target: Path) -> bool:
    """Tell whether a dataset of pooled labels is complete."""
    return _done(target).exists()


def pooled_spec(spec: SoftLabelSpec) -> SoftLabelSpec:
    """Say what pooled labels mean: they are not the teacher's, and whatever temperature it had is in the weights."""
    return replace(spec, teacher=f"{spec.teacher}, pooled with the student that chose", temperature=1.0)


def _pooled(
    table: pa.Table, before: SoftLabelSpec, after: SoftLabelSpec, student: Path, beliefs: BeliefPool
) -> pa.Table:
    (batch,) = table.combine_chunks().to_batches()
    said = decode(table, before).logprobs.reshape(table.num_rows, -1)
    labels = encode(beliefs.labels(said, cached_student(str(student)).logits(batch)).astype(np.float32), after)
    for name, column in zip(labels.schema.names, labels.columns, strict=True):
        table = table.set_column(table.schema.get_field_index(name), labels.schema.field(name), column)
    return table.drop_columns([name for name in OF_THE_TEACHER if name in table.column_names])


def _done(target: Path) -> Path:
    return target.with_name(f"{target.name}.beliefs.json")
