"""The pseudo-label phase: soft labels that an ensemble of students gives to rows of the pool that were not bought.

    log y(x) = log mean_k softmax(z_k(x)) / T - log Z(x)

with z_k the logits of the members, which differ in their seeds, and T the temperature that suits the validation set, which none
of them has learned; or, of members that have each learned another part of it, the mean of
softmax(z_k(x) / T). They are a dataset of their own, whose specification names the ensemble where another names the teacher;
nobody is asked. A unit of the pool becomes one shard, or an empty file where none of its rows is drawn and can be read.

References:
  Lee, Pseudo-Label, ICML workshop 2013; Lakshminarayanan et al., arXiv 1612.01474 (ensembles of seeds); Xie et al., Self-training
  with Noisy Student, arXiv 1911.04252 (soft labels, a student with noise).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.special import log_softmax, logsumexp

from distilbeam.inputs.columns import without_dictionaries
from distilbeam.pipelines.acquisition.score import unbought_rows, unit_name
from distilbeam.pipelines.acquisition.usable_answers import UsableAnswers, ask_student
from distilbeam.pipelines.engine.counters import count, timed
from distilbeam.pipelines.labelling.label_rows import ROW
from distilbeam.pipelines.pool.content_ids import ID_BYTES, content_ids
from distilbeam.pipelines.pool.row_reader import RowReader
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.selection.rounding import shard_rng
from distilbeam.student.checkpoint import Student, load_student
from distilbeam.teacher.softlabels import SoftLabelSpec, encode, entry_path, label_key
from distilbeam.teacher.softlabels.manifest import ManifestEntry
from distilbeam.teacher.softlabels.placing import commit_placed, place_shard

Floats = npt.NDArray[np.float32]


def mean_logprobs(members: Sequence[npt.NDArray[np.floating]]) -> npt.NDArray[np.float64]:
    """Average the members' probabilities.

    Args:
      members: logits float [n, C] of each.

    Returns:
      float64 [n, C], the logarithms of the mean probabilities.
    """
    said = [log_softmax(np.asarray(logits, np.float64), axis=1) for logits in members]
    return np.asarray(logsumexp(said, axis=0) - np.log(len(said)))


def pseudo_spec(spec: SoftLabelSpec, fingerprints: Sequence[str], temperature: float) -> SoftLabelSpec:
    """Say what pseudo-labels are: whose, and at which temperature; kind and storage are those of the labels they stand beside."""
    members = hashlib.blake2b("\n".join(fingerprints).encode(), digest_size=8).hexdigest()
    name = f"pseudo-labels of an ensemble of {len(fingerprints)} students, {members}"
    return replace(spec, teacher=name, temperature=temperature)


@dataclass(frozen=True)
class PseudoLabel:
    """The work of the pseudo-label phase.

    Attributes:
      students: directories of the members.
      spec: what the labels are; see `pseudo_spec`.
      output: directory of the dataset.
      bought: directories with the picks of all rounds.
      share: of the rows that were not bought, in (0, 1], that are drawn.
      seed: the run's seed, which they are drawn with.
      columns: pool columns that the students read.
      id_column: column with the user's ids, or None for the hash of the carried columns.
      batch_rows: most rows that are answered at a time.
      each: whether the temperature divides each member's logits; else those of their mean.
      trust: modules whose code the students may call; see `student.trust`.
    """

    students: tuple[str, ...]
    spec: SoftLabelSpec
    output: str
    bought: tuple[str, ...]
    share: float
    seed: int
    columns: tuple[str, ...]
    id_column: str | None
    batch_rows: int
    each: bool = False
    trust: tuple[str, ...] = ()

    def __call__(self, unit: Unit) -> Iterator[ManifestEntry]:
        """Label the drawn rows of a unit, when iterated."""
        rows = self._drawn(unit)
        wanted = dict.fromkeys([*self.spec.carried, *self.columns, *([self.id_column] if self.id_column else [])])
        reader = RowReader(tuple(wanted), self.batch_rows)
        parts = [
            self._labelled(without_dictionaries(batch), unit.pool_row + rows[piece])
            for batch, piece in reader.read(unit, rows)
        ]
        tables = [table for table in parts if table.num_rows]
        count("rows_scored", len(rows))
        if not tables:
            self._empty(unit).parent.mkdir(parents=True, exist_ok=True)
            self._empty(unit).touch()
            return
        with timed("write"):
            yield place_shard(self.output, pa.concat_tables(tables), self.spec, self._key(unit))

    def settle(self, ends: Sequence[ManifestEntry]) -> None:
        """Flush and commit shards."""
        commit_placed(self.output, ends)

    def remaining(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units that have neither a shard nor the mark that nothing is drawn of them."""
        return [
            unit
            for unit in units
            if not entry_path(self.output, self._key(unit)).exists() and not self._empty(unit).exists()
        ]

    def name(self, unit: Unit) -> str:
        """Name the unit by its file and rows."""
        return unit_name(unit)

    def rows(self, unit: Unit) -> int:
        """Return the unit's rows."""
        return unit.rows

    def _drawn(self, unit: Unit) -> npt.NDArray[np.int64]:
        rows = unbought_rows(unit, self.bought)
        if self.share >= 1:
            return rows
        rng: np.random.Generator = shard_rng(self.seed, len(self.bought), f"pseudo-labels {unit.uid}")
        return rows[rng.random(len(rows)) < self.share]

    def _labelled(self, batch: pa.RecordBatch, pool_rows: npt.NDArray[np.int64]) -> pa.Table:
        """Label those rows of a batch that every member can read."""
        with timed("score"):
            said = [ask_student(student, batch) for student in _members(self.students, self.trust)]
        usable = _common(said)
        each = self.spec.temperature if self.each else 1.0
        # `encode` divides by the temperature, which the mean of tempered members has behind it
        logits = each * mean_logprobs([one.logits[np.isin(one.rows, usable)] / each for one in said])
        rows = pa.Table.from_batches([batch]).take(pa.array(usable))
        seeds = (pool_rows[usable] + self.seed).astype(np.uint64) if self.spec.kind == "sampled" else None
        labels = encode(logits.astype(np.float32), self.spec, seeds=seeds)
        ones = np.ones(len(usable))
        columns = {
            "example_id": self._ids(rows),
            ROW: pa.array(pool_rows[usable]),
            **{name: rows[name] for name in self.spec.carried},
            **dict(zip(labels.schema.names, labels.columns, strict=True)),
            # an objective that asks how far to trust the teacher takes these as they are: its estimates are not about them
            "alpha": pa.array(ones, pa.float32()),
            "candidates": pa.array(ones, pa.int32()),
            "weight": pa.array(ones, pa.float32()),
        }
        fields = {field.name: field for field in (*rows.schema, *labels.schema)}
        schema = pa.schema([fields.get(name, pa.field(name, column.type)) for name, column in columns.items()])
        return pa.table(list(columns.values()), schema=schema)

    def _ids(self, rows: pa.Table) -> pa.Array:
        if self.id_column is None:
            return pa.array(content_ids(rows.select(self.spec.carried)), pa.binary(ID_BYTES))
        ids = rows[self.id_column].combine_chunks()
        return ids if pa.types.is_string(ids.type) or pa.types.is_binary(ids.type) else ids.cast(pa.string())

    def _key(self, unit: Unit) -> str:
        content = f"{unit.uid} {self.share.hex()} {self.seed} {len(self.bought)}"
        return label_key(content, self.spec.teacher, self.spec)

    def _empty(self, unit: Unit) -> Path:
        return Path(f"{self.output}.empty") / self._key(unit)


def _common(said: Sequence[UsableAnswers]) -> npt.NDArray[np.int64]:
    """Give the rows that all members answered."""
    usable = said[0].rows
    for one in said[1:]:
        usable = usable[np.isin(usable, one.rows)]
    return usable


@lru_cache(maxsize=1)
def _members(directories: tuple[str, ...], trust: tuple[str, ...]) -> tuple[Student, ...]:
    return tuple(load_student(directory, trust) for directory in directories)
