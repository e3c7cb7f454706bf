"""The description of a soft-label dataset for people: specification, sizes, confidence, some rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Group, RenderableType

from distilbeam.storage.paths import StoreError
from distilbeam.storage.stores import store_of
from distilbeam.teacher.softlabels.codec import SoftLabels, decode
from distilbeam.teacher.softlabels.columns import CLASSES, LOGPROBS, TAIL
from distilbeam.teacher.softlabels.manifest import Manifest, read_manifest
from distilbeam.teacher.softlabels.plain_table import PlainTable, bytes_table, confidence_table, facts_table
from distilbeam.teacher.softlabels.spec import SoftLabelSpec, require_unit

_BATCH_ROWS = 16_384
_CLASSES_SHOWN = 3


@dataclass(frozen=True)
class Sample:
    """One row: its id and its most probable classes with their probabilities."""

    example_id: str
    classes: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Inspection:
    """A summary of a soft-label dataset; printing it with rich shows tables.

    Attributes:
      directory: the folder of the soft-label dataset.
      spec: its specification.
      shards: number of shards.
      rows: number of rows.
      bytes: size of all shards.
      column_bytes: compressed bytes of each column of the shards that were opened, per row of them.
      confidence: how many rows have their largest probability in each of equal parts of [0, 1].
      confidence_rows: rows that `confidence` counts.
      samples: rows chosen at random.
    """

    directory: Path
    spec: SoftLabelSpec
    shards: int
    rows: int
    bytes: int
    column_bytes: dict[str, float]
    confidence: tuple[int, ...]
    confidence_rows: int
    samples: tuple[Sample, ...]

    @property
    def bytes_per_row(self) -> float:
        """Bytes of a row on the disk."""
        return self.bytes / self.rows

    def __rich__(self) -> RenderableType:
        """Show the summary."""
        return Group(self._facts(), self._columns(), self._histogram(), self._samples())

    def _facts(self) -> PlainTable:
        spec = self.spec
        kind = {"dense": "dense", "top_k": f"top {spec.k} with tail", "sampled": f"{spec.k} draws (RS-KD)"}[spec.kind]
        names = "unnamed" if spec.classes is None else ", ".join([*spec.classes[:5], *["…"][: len(spec.classes) > 5]])
        facts = {
            "format version": spec.version,
            "labels": kind,
            "classes": f"{spec.num_classes:,} ({names})",
            "temperature": f"{spec.temperature:g}",
            "teacher": spec.teacher or "unknown",
            "carried columns": ", ".join(spec.carried) or "none",
            "storage": spec.storage,
            "shards": f"{self.shards:,}",
            "rows": f"{self.rows:,}",
            "size": f"{self.bytes:,} bytes, {self.bytes_per_row:,.1f} per row",
        }
        return facts_table(f"Soft labels in {self.directory}", facts)

    def _columns(self) -> PlainTable:
        return bytes_table("row", self.column_bytes, 1)

    def _histogram(self) -> PlainTable:
        title = f"The teacher's confidence in {self.confidence_rows:,} rows"
        return confidence_table(title, "rows", self.confidence)

    def _samples(self) -> PlainTable:
        table = PlainTable("example_id", "most probable classes", title="Rows chosen at random", title_justify="left")
        for sample in self.samples:
            shown = ", ".join(f"{name} {probability:.3f}" for name, probability in sample.classes)
            table.add_row(sample.example_id, shown)
        return table


def inspect_labels(
    path: str | Path, *, samples: int = 5, bins: int = 10, most_rows: int = 1_000_000, seed: int = 0
) -> Inspection:
    """Summarise a soft-label dataset.

    Args:
      path: the folder of the soft-label dataset.
      samples: rows to show.
      bins: parts of the histogram of the teacher's confidence.
      most_rows: whole shards are opened in random order until they have this many rows.
      seed: seed of the random choices.

    Returns:
      The summary.

    Raises:
      ValueError: there is no dataset, or a shard cannot be read.
    """
    manifest = read_manifest(path)
    require_unit(manifest.spec, "example", path)
    rng = np.random.default_rng(seed)
    opened = some_shards(manifest, most_rows, rng)
    confidence, column_bytes = np.zeros(bins, np.int64), Counter[str]()
    total = sum(manifest.entries[i].rows for i in opened)
    wanted = np.sort(rng.choice(total, min(samples, total), replace=False))
    shown: list[Sample] = []
    first = 0
    for i in opened:
        column_bytes.update(column_sizes(manifest.paths()[i]))
        for batch in _batches(manifest.paths()[i]):
            labels = decode(batch, manifest.entries[i].spec)
            best = np.exp(labels.logprobs.max(axis=1))
            confidence += np.bincount(np.minimum((best * bins).astype(int), bins - 1), minlength=bins)
            here = wanted[(wanted >= first) & (wanted < first + len(batch))] - first
            shown += [_sample(batch, labels, row, manifest.spec) for row in here.tolist()]
            first += len(batch)
    return Inspection(
        manifest.directory,
        manifest.spec,
        len(manifest.entries),
        manifest.rows,
        manifest.bytes,
        {name: size / total for name, size in column_bytes.items()},
        tuple(confidence.tolist()),
        total,
        tuple(shown),
    )


def some_shards(manifest: Manifest, most_rows: int, rng: np.random.Generator) -> list[int]:
    """Choose shards at random until they have enough rows; their numbers, ascending."""
    order = rng.permutation(len(manifest.entries))
    before = np.cumsum([0, *(manifest.entries[i].rows for i in order)])[:-1]
    return sorted(int(i) for i in order[before < most_rows])


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with opened_shard(path) as file:
        names = [name for name in ("example_id", LOGPROBS, CLASSES, TAIL) if name in file.schema_arrow.names]
        yield from file.iter_batches(_BATCH_ROWS, columns=names)


@contextmanager
def opened_shard(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a shard, or say in a sentence that it cannot be read."""
    try:
        with store_of(path).open_parquet(path) as file:
            yield file
    except StoreError:
        raise
    except (OSError, pa.ArrowException) as e:
        reason = str(e).splitlines()[0]
        raise ValueError(f"{path} cannot be read ({reason}); 'distilbeam verify' says what else is damaged") from e


def column_sizes(path: Path) -> dict[str, int]:
    """Add up the compressed bytes of each column of a shard."""
    sizes = Counter[str]()
    with opened_shard(path) as file:
        metadata = file.metadata
    for group in range(metadata.num_row_groups):
        for i in range(metadata.num_columns):
            column = metadata.row_group(group).column(i)
            sizes[column.path_in_schema.partition(".")[0]] += column.total_compressed_size
    return sizes


def _sample(batch: pa.RecordBatch, labels: SoftLabels, row: int, spec: SoftLabelSpec) -> Sample:
    value = batch["example_id"][row].as_py()
    example_id = value.hex() if isinstance(value, bytes) else str(value)
    logprobs = labels.logprobs[row]
    classes: Sequence[int] | npt.NDArray[np.int32] = (
        range(len(logprobs)) if labels.classes is None else labels.classes[row]
    )
    best = np.argsort(-logprobs, kind="stable")[:_CLASSES_SHOWN]
    shown = [(spec.class_name(int(classes[i])), float(np.exp(logprobs[i]))) for i in best if classes[i] >= 0]
    return Sample(example_id, tuple(shown))
