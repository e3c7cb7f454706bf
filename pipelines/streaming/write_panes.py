"""WritePanes: the outcomes of a window to a shard, its dead letters and the entry that commits both with their offsets.

A pane's name holds a hash of the rows in it, so that it never replaces another's file: a late message, a job started again
and a second job add panes. A repetition of the same pane has the same name and writes nothing.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.transforms.window import IntervalWindow

from distilbeam.pipelines.streaming.journal import FOLDER, MESSAGES, ids_folder
from distilbeam.pipelines.streaming.label_messages import row_names, sorted_by_place
from distilbeam.pipelines.streaming.message import AGAIN, LETTERS, OFFSET, PARTITION, Outcome
from distilbeam.pipelines.streaming.offsets import Offsets
from distilbeam.pipelines.transforms.beam_files import (
    exists_anywhere,
    write_parquet_anywhere,
    write_shard_anywhere,
    write_text_anywhere,
)
from distilbeam.pipelines.transforms.select_examples import window_name
from distilbeam.pipelines.transforms.write_soft_labels import rows_digest
from distilbeam.teacher.softlabels import SoftLabelSpec
from distilbeam.teacher.softlabels.manifest import FOLDER as MANIFEST

_GIVEN_UP = "this pipeline was given up and submitted again"


class WritePanes(beam.PTransform):
    """Write each window's outcomes; give what was committed, as JSON values.

    Args:
      dataset: the soft-label dataset.
      dead_letters: folder of the dead letters.
      spec: the dataset's specification.
      topic: the topic.
      shards: shards of a window.
      attempt: name of this submission of the pipeline; see `fence`.
      again: mark of the dead letters that these messages were, or "".
    """

    def __init__(
        self,
        dataset: str,
        dead_letters: str,
        spec: SoftLabelSpec,
        topic: str,
        *,
        shards: int = 1,
        attempt: str = "",
        again: str = "",
    ) -> None:
        super().__init__()
        self.shards = shards
        self.write = _WritePane(dataset, dead_letters, spec, topic, attempt, again)

    def expand(self, outcomes: Any) -> Any:
        return (
            outcomes
            | "ByShard" >> beam.Map(_by_shard, self.shards)
            | "MeetPerWindow" >> beam.GroupByKey()
            | "WritePane" >> beam.ParDo(self.write)
        )


class _Commits:
    """The commits under way of this process, side by side: each waits for the disk most of its time."""

    def __init__(self) -> None:
        self._ended: set[str] = set()
        self._under_way: Counter[str] = Counter()
        self._changed = threading.Condition()

    @contextmanager
    def one(self, attempt: str) -> Iterator[None]:
        """Commit something in the block.

        Raises:
          RuntimeError: the submission was given up.
        """
        with self._changed:
            if attempt in self._ended:
                raise RuntimeError(_GIVEN_UP)
            self._under_way[attempt] += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way[attempt] -= 1
                self._changed.notify_all()

    def end(self, attempt: str) -> None:
        """Let nothing more begin, and wait for what has begun."""
        with self._changed:
            self._ended.add(attempt)
            self._changed.wait_for(lambda: not self._under_way[attempt])


_commits = _Commits()


def fence(attempt: str) -> None:
    """Let no worker of this process commit anything more for a submission whose engine has died.

    Its threads outlive the engine; what one of them committed after the next submission has looked at what is settled would
    be asked and written twice. A commit under way is waited for.
    """
    _commits.end(attempt)


def _by_shard(outcome: Outcome, shards: int) -> tuple[int, Outcome]:
    return int(outcome.digest[:8], 16) % shards, outcome


class _WritePane(beam.DoFn):
    def __init__(
        self, dataset: str, dead_letters: str, spec: SoftLabelSpec, topic: str, attempt: str, again: str
    ) -> None:
        self.dataset, self.dead_letters, self.spec, self.topic = dataset, dead_letters, spec, topic
        self.attempt, self.again = attempt, again
        self.written = Metrics.counter("WritePanes", "written")

    def process(
        self,
        element: tuple[int, Iterable[Outcome]],
        window: Any = beam.DoFn.WindowParam,
        pane: Any = beam.DoFn.PaneInfoParam,
    ) -> Iterator[dict[str, Any]]:
        shard, outcomes = element
        ordered = sorted(outcomes, key=lambda outcome: outcome.digest)
        yield from (self._record_of_empty(outcome.empty) for outcome in ordered if outcome.empty is not None)
        ordered = [outcome for outcome in ordered if outcome.empty is None]
        if not ordered:
            return
        tables = [outcome.labels for outcome in ordered if outcome.labels is not None]
        letters = [letter for outcome in ordered for letter in outcome.letters]
        labels = sorted_by_place(pa.concat_tables(tables)) if tables else None
        names = [] if labels is None else row_names(labels)
        names += [repr((item["partition"], item["offset"], item["key"], item["error"])) for item in letters]
        ids = sorted({name for outcome in ordered for name in outcome.ids})
        names += ids or ([] if names else [outcome.digest for outcome in ordered])
        names += [self.again] if self.again else []
        key = f"window={window_name(window)}-{shard:05d}-{rows_digest(names)}"
        facts: dict[str, Any] = {
            "window": window_name(window),
            "firing": pane.index,
            "topic": self.topic,
            "offsets": self._settled(ordered).to_json(),
            "dead": dict(Counter(item["stage"] for item in letters)),
        }
        if self.again:
            facts[AGAIN] = True
        if ids:
            facts[MESSAGES] = len(ids)
        with _commits.one(self.attempt):
            if not any(exists_anywhere(self.dataset, folder, f"{key}.json") for folder in (MANIFEST, FOLDER)):
                self._commit(key, labels, letters, ids, facts)
        rows = 0 if labels is None else labels.num_rows
        self.written.inc(rows)
        yield {"key": key, "rows": rows, **facts}

    def _record_of_empty(self, span: tuple[float, float]) -> dict[str, Any]:
        """Commit that windows have passed without a message: who reads labels waits for nothing more of them."""
        name = window_name(IntervalWindow(*span))
        facts = {"window": name, "topic": self.topic, "offsets": {}, "empty": True}
        key = f"empty={name}"
        with _commits.one(self.attempt):
            if not exists_anywhere(self.dataset, FOLDER, f"{key}.json"):
                write_text_anywhere(self.dataset, FOLDER, f"{key}.json", json.dumps(facts, sort_keys=True))
        return {"key": key, "rows": 0, **facts}

    def _settled(self, outcomes: list[Outcome]) -> Offsets:
        offsets = Offsets()
        for outcome in outcomes:
            for partition, first, last in outcome.covers:
                offsets.add(partition, first, last)
            # with a budget what is read and what is labelled come apart; a pane settles at least what it holds
            if not outcome.covers and outcome.labels is not None and PARTITION in outcome.labels.column_names:
                places = (outcome.labels[name].to_pylist() for name in (PARTITION, OFFSET))
                for partition, offset in zip(*places, strict=True):
                    offsets.add(partition, offset, offset)
        return offsets

    def _commit(
        self, key: str, labels: pa.Table | None, letters: list[dict[str, Any]], ids: list[str], facts: dict[str, Any]
    ) -> None:
        """Write the dead letters and the ids of the messages, then the shard, then what commits them."""
        if ids:
            write_parquet_anywhere(ids_folder(self.dataset), f"{key}.parquet", pa.table({"message_id": ids}))
        if letters:
            table = pa.Table.from_pylist(letters, schema=LETTERS)
            write_parquet_anywhere(self.dead_letters, f"{key}.parquet", table)
            facts["dead_letters"] = f"{key}.parquet"
        if labels is None:
            write_text_anywhere(self.dataset, FOLDER, f"{key}.json", json.dumps(facts, sort_keys=True))
        else:
            write_shard_anywhere(self.dataset, key, labels, self.spec, facts)
