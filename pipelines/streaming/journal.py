"""What a stream's dataset has settled: the offsets in its manifest entries and in the records of what has no labels.

A shard's manifest entry says which offsets are settled with it; a pane without a label (refused messages alone) leaves a
record in the folder `_stream` instead, as do windows without a message and offsets that the user passed over (`--start
latest`). Of a source without offsets the ids of a pane's messages lie in a file beside, which counts once the pane is
committed. Nothing else is kept: where the next job begins follows from what is committed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from distilbeam.pipelines.streaming.offsets import Offsets
from distilbeam.storage.atomic import replacing
from distilbeam.storage.paths import is_remote, list_files, read_texts, to_path
from distilbeam.teacher.softlabels.manifest import manifest_files, read_entries

FOLDER = "_stream"
MESSAGES = "messages"  # in an entry or a record: how many messages its file of ids holds
_IDS = "ids"
_SHARE = 20.0  # of a processor's time: a listing of a hundred thousand entries is not made twice a second
_STORE_S = 5.0  # between two listings of a store, which cost money


@dataclass
class Settled:
    """What is committed of a topic.

    Attributes:
      offsets: all that is settled.
      skipped: those of them that the user passed over.
      labels: labelled messages.
      dead: dead letters, by their stage.
      messages: messages that are settled by their ids, where they have no offsets.
      closed_s: the end of the latest window that has an entry or a record, in seconds since 1970; 0 without one.
    """

    offsets: Offsets = field(default_factory=Offsets)
    skipped: Offsets = field(default_factory=Offsets)
    labels: int = 0
    dead: dict[str, int] = field(default_factory=dict)
    messages: int = 0
    closed_s: float = 0.0

    @property
    def count(self) -> int:
        """Number of messages that are settled."""
        return self.offsets.count + self.messages

    def add(self, facts: Mapping[str, Any], rows: int) -> None:
        """Add what an entry or a record says."""
        offsets = Offsets.from_json(facts.get("offsets", {}))
        self.offsets.update(offsets)
        if facts.get("skipped"):
            self.skipped.update(offsets)
        self.labels += rows
        self.messages += facts.get(MESSAGES, 0)
        for stage, count in facts.get("dead", {}).items():
            self.dead[stage] = self.dead.get(stage, 0) + count
        _, bounded, end = str(facts.get("window", "")).rpartition("-")
        if bounded:
            self.closed_s = max(self.closed_s, datetime.fromisoformat(end).timestamp())


class Journal:
    """Reads what is settled of a topic, and later what has come since.

    Args:
      dataset: the dataset.
      topic: the topic; "" for files.
    """

    def __init__(self, dataset: str, topic: str) -> None:
        self.root, self.topic = to_path(dataset), topic
        self.settled = Settled()
        self._read: set[str] = set()
        self._next = -float("inf")

    def hurry(self) -> None:
        """Look the next time, whenever that is."""
        self._next = -float("inf")

    def look(self) -> list[dict[str, Any]]:
        """Read what is new; return its facts. It looks no oftener than its own cost allows: nothing in between."""
        start = time.monotonic()
        if start < self._next:
            return []
        found = []
        for key, rows, facts in [*self._entries(), *self._records()]:
            if key not in self._read and facts.get("topic", "") == self.topic:
                self.settled.add(facts, rows)
                found.append({**facts, "rows": rows, "key": key})
            self._read.add(key)
        cost_s = time.monotonic() - start
        self._next = start + max(_SHARE * cost_s, _STORE_S if is_remote(self.root) else 0.0)
        return found

    def _entries(self) -> Iterable[tuple[str, int, dict[str, Any]]]:
        files = [file for file in manifest_files(self.root) if file.stem not in self._read]
        for entry in read_entries(files) if files else ():
            yield entry.key, entry.rows, dict(entry.extra)
        self._read.update(file.stem for file in files if file.suffix == ".jsonl")  # named by what it gathers

    def _records(self) -> Iterable[tuple[str, int, dict[str, Any]]]:
        files = [file for file in list_files(self.root / FOLDER, "*.json") if file.stem not in self._read]
        for file, text in zip(files, read_texts(files), strict=True):
            yield file.stem, 0, json.loads(text)


def skip(dataset: str, topic: str, offsets: Offsets) -> None:
    """Record offsets that the user passes over."""
    facts = {"topic": topic, "offsets": offsets.to_json(), "skipped": True}
    text = json.dumps(facts, sort_keys=True)
    key = f"skipped-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
    with replacing(record_path(dataset, key)) as temporary:
        temporary.write_text(text)


def ids_folder(dataset: str) -> str:
    """Return the folder of the ids of messages that panes have settled, a Parquet file for each pane."""
    return f"{dataset.rstrip('/')}/{FOLDER}/{_IDS}"


def record_path(dataset: str, key: str) -> Path:
    """Return the file of the record of a pane without labels."""
    return to_path(dataset) / FOLDER / f"{key}.json"
