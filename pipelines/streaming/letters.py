"""Dead letters as a source: the messages without a label are decoded and asked again.

What is labelled now is committed as panes of its own, whose entries say so; what fails once more is a dead letter anew. The
former files go when all of that is committed, so that a job that is killed meanwhile loses no message and, started again,
asks about none that was labelled.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow.parquet as pq
from apache_beam.transforms.window import TimestampedValue

from distilbeam.pipelines.streaming.decode import Decoder
from distilbeam.pipelines.streaming.kafka_reader import event_time_s
from distilbeam.pipelines.streaming.message import AGAIN, MESSAGE, OFFSET, PARTITION, UNKNOWN, Message, MessageBatch
from distilbeam.storage.paths import joined, list_files, readable, remove_files, to_path
from distilbeam.teacher.softlabels.manifest import manifest_files, read_entries


class Letters:
    """The dead letters of a folder, each once, without those that a job has labelled since.

    Args:
      folder: the folder.
      dataset: the dataset that they lack in.

    Raises:
      ValueError: there are none, or they are of several topics.
    """

    def __init__(self, folder: str, dataset: str) -> None:
        self._files = list_files(to_path(folder), "*.parquet")
        found = [row for file in self._files for row in pq.read_table(readable(file), partitioning=None).to_pylist()]
        if not found:
            raise ValueError(f"--source: there are no dead letters in {folder}")
        topics = sorted({row["topic"] for row in found})
        if len(topics) > 1:
            raise ValueError(
                f"--source: {folder} holds dead letters of several topics ({', '.join(topics)}); part them"
            )
        if lacking := sum(row["value"] is None and row["timestamp_ms"] == UNKNOWN for row in found):
            raise ValueError(
                f"--source: {lacking:,} of the dead letters in {folder} are rows that were chosen within a budget and have no "
                "content; read their offsets again with --start earliest into another --out"
            )
        self.topic: str = topics[0]
        labelled = _labelled(to_path(dataset))
        one_each = {_name(row): row for row in found}
        self.rows = [row for row in one_each.values() if _name(row) not in labelled]

    def batches(self, window_s: float, rows: int, clock: Decoder | None) -> Iterator[tuple[float, MessageBatch]]:
        """Give batches of up to `rows` messages of one window each, with the window's start in seconds."""
        now = time.time()
        placed = sorted(
            (event_time_s(message, clock, now) // window_s, message.partition, message.offset, i, message)
            for i, message in enumerate(map(_message, self.rows))
        )
        for window, group in groupby(placed, key=lambda item: item[0]):
            same = [item[-1] for item in group]
            for start in range(0, len(same), rows):
                messages = tuple(same[start : start + rows])
                covers = tuple((m.partition, m.offset, m.offset) for m in messages if m.partition != UNKNOWN)
                yield max(0.0, window * window_s), MessageBatch(messages, covers)

    @property
    def mark(self) -> str:
        """A hash of the files: it makes the names of panes that hold the same dead letters again differ from theirs."""
        return hashlib.blake2b("\n".join(sorted(file.name for file in self._files)).encode(), digest_size=8).hexdigest()

    def forget(self) -> None:
        """Remove the former files: what is in them is committed, labelled or dead anew."""
        remove_files(self._files)


def read_letters(pipeline: Any, batches: Sequence[tuple[float, MessageBatch]]) -> Any:
    """Give batches to a pipeline at their times."""
    return pipeline | "Letters" >> beam.Create(list(batches)) | "AtTheirTime" >> beam.Map(_stamped)


def _stamped(item: tuple[float, MessageBatch]) -> TimestampedValue:
    return TimestampedValue(item[1], item[0])


def _message(row: dict[str, Any]) -> Message:
    headers = tuple((header["name"], header["value"]) for header in row["headers"] or ())
    name = row.get("message_id") or ""  # letters of former versions have none
    return Message(row["partition"], row["offset"], row["timestamp_ms"], row["key"], row["value"], headers, name)


def _name(row: dict[str, Any]) -> Any:
    if row["partition"] != UNKNOWN:
        return row["partition"], row["offset"]
    return row.get("message_id") or (row["timestamp_ms"], row["key"], row["value"])


def _labelled(dataset: Path) -> set[Any]:
    """List the places or ids of messages that were dead letters and have a label now."""
    found: set[Any] = set()
    for entry in read_entries(manifest_files(dataset)):
        if entry.extra.get(AGAIN):
            shard = pq.ParquetFile(readable(joined(dataset, entry.path)))
            names = [name for name in (PARTITION, OFFSET, MESSAGE) if name in shard.schema_arrow.names]
            columns = [shard.read(names)[name].to_pylist() for name in names]
            found.update(columns[0] if names == [MESSAGE] else zip(*columns, strict=True))
    return found
