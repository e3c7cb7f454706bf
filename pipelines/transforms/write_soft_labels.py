"""WriteSoftLabels: labelled batches to a soft-label dataset, a set of shards per window."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa

from distilbeam.pipelines.transforms.beam_files import write_shard_anywhere
from distilbeam.pipelines.transforms.select_examples import batch_digest, window_name
from distilbeam.teacher.softlabels import SoftLabelSpec


class WriteSoftLabels(beam.PTransform):
    """Write each window's labelled batches as shards of one soft-label dataset; give the manifest entries.

    A shard is named by its window, its number and a hash of its rows' ids, and its rows are in an order of their own: a
    repeated bundle writes the same file again, and nothing that is committed is ever replaced by other rows, be they late
    ones or those of another job that meets the window again. A shard without rows is not written.

    Args:
      directory: the dataset; a directory, or a place in an object store that Beam has a file system for.
      spec: its specification, as given to `LabelExamples`.
      shards: shards of a window; a worker holds one in memory.

    Raises:
      ValueError: shards is less than 1.
    """

    def __init__(self, directory: str | Path, spec: SoftLabelSpec, *, shards: int = 1) -> None:
        super().__init__()
        if shards < 1:
            raise ValueError(f"shards must be at least 1, got {shards}")
        self.directory, self.spec, self.shards = str(directory), spec, shards

    def expand(self, batches: Any) -> Any:
        return (
            batches
            | "ByShard" >> beam.FlatMap(_by_shard, self.shards)
            | "MeetPerWindow" >> beam.GroupByKey()
            | "WriteShard" >> beam.ParDo(_WriteShard(self.directory, self.spec))
        )


def rows_digest(names: Iterable[str]) -> str:
    """Hash what rows are called, in whatever order and batches they come: 16 hexadecimal digits."""
    return hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=8).hexdigest()


def _by_shard(batch: pa.RecordBatch, shards: int) -> Iterator[tuple[int, tuple[str, pa.RecordBatch]]]:
    if batch.num_rows:
        digest = batch_digest(batch)
        yield int(digest[:8], 16) % shards, (digest, batch)


class _WriteShard(beam.DoFn):
    def __init__(self, directory: str, spec: SoftLabelSpec) -> None:
        self.directory, self.spec = directory, spec

    def process(
        self,
        element: tuple[int, Iterable[tuple[str, pa.RecordBatch]]],
        window: Any = beam.DoFn.WindowParam,
        pane: Any = beam.DoFn.PaneInfoParam,
    ) -> Iterator[dict[str, Any]]:
        shard, items = element
        ordered = sorted(items, key=lambda item: item[0])
        content = rows_digest(repr(i) for _, batch in ordered for i in batch["example_id"].to_pylist())
        name = f"window={window_name(window)}-{shard:05d}-{content}"
        extra = {"window": window_name(window), "firing": pane.index, "content": content}
        table = pa.Table.from_batches([batch for _, batch in ordered])
        yield write_shard_anywhere(self.directory, name, table, self.spec, extra).to_json()
