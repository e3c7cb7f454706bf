"""LabelMessages: batches of messages to their outcomes, a label or a dead letter for every message."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from threadpoolctl import ThreadpoolController

from distilbeam.pipelines.engine.model_cache import cached_teacher
from distilbeam.pipelines.engine.phase import threads
from distilbeam.pipelines.labelling.label_rows import Labelled, Labelling, plain
from distilbeam.pipelines.streaming.decode import Decoded, Decoder
from distilbeam.pipelines.streaming.message import MESSAGE, OFFSET, PARTITION, UNKNOWN, Message, MessageBatch, Outcome

_LATE = "it came after its window was closed and the allowed lateness had passed; raise --allowed-lateness-s"


class _OneThread(beam.DoFn):
    """Keeps models to one thread for as long as a bundle takes: to look for their libraries takes as long as to ask a small one."""

    _limit: AbstractContextManager[None] | None = None

    def start_bundle(self) -> None:
        self._limit = threads(1)
        self._limit.__enter__()

    def finish_bundle(self) -> None:
        limit, self._limit = self._limit, None
        if limit is not None:
            limit.__exit__(None, None, None)


class LabelMessages(_OneThread):
    """Decode a batch, ask the teacher, and account for every message; a source does it in its own step (`batch_source`).

    Args:
      decoder: how messages become rows.
      labelling: how rows are labelled.
      topic: the topic, for dead letters.
    """

    def __init__(self, decoder: Decoder, labelling: Labelling, topic: str) -> None:
        self.decoder, self.labelling, self.topic = decoder, labelling, topic

    def process(self, batch: MessageBatch) -> Iterator[Outcome]:
        found = self.begin(batch)
        if not isinstance(found, Outcome):
            found = found()
            self.require_same_teacher()
        yield found

    def begin(self, batch: MessageBatch) -> Outcome | Callable[[], Outcome]:
        """Decode a batch; give what became of it or, where the teacher is to be asked, what asks."""
        if batch.empty is not None:
            return nothing(batch.empty)
        if batch.late:
            letters = [letter(self.topic, message, "late", _LATE) for message in batch.messages]
            return outcome(None, letters, batch.covers, batch.ids)
        decoded = self.decoder(batch.messages)
        letters = [letter(self.topic, batch.messages[i], "message", why) for i, why in decoded.refused.items()]
        if not decoded.rows.num_rows:
            return outcome(None, letters, batch.covers, batch.ids)
        return partial(self._asked, batch, decoded, letters)

    def _asked(self, batch: MessageBatch, decoded: Decoded, letters: list[dict[str, Any]]) -> Outcome:
        rows = pa.Table.from_batches([decoded.rows])
        labelled = self.labelling(rows, checked=False)
        letters += failures_to_letters(self.topic, labelled, [batch.messages[i] for i in decoded.good])
        return outcome(labels_of(labelled, rows), letters, batch.covers, batch.ids)

    def in_flight(self) -> int:
        """Return how many batches the teacher takes at once: a server says how many requests, a model here is asked by one."""
        return max(1, getattr(cached_teacher(self.labelling.teacher), "parallel", 1))

    def start_thread(self) -> None:
        """Keep models that this thread asks to one thread: OpenMP has a number for each, `threads` sets the others for all."""
        ThreadpoolController().limit(limits=1, user_api="openmp")

    def require_same_teacher(self) -> None:
        """See that the teacher is the one of the labels still; a server is asked a question of its own for that.

        Raises:
          ValueError: it is another one.
          TeacherChanged: it says so itself.
        """
        self.labelling.checked_teacher()


class DecodeMessages(beam.DoFn):
    """Decode a batch without asking: rows to the main output, the account of all messages to the output `receipts`."""

    def __init__(self, decoder: Decoder, topic: str) -> None:
        self.decoder, self.topic = decoder, topic

    def process(self, batch: MessageBatch) -> Iterator[Any]:
        if batch.empty is not None:
            yield beam.pvalue.TaggedOutput("receipts", nothing(batch.empty))
            return
        refused = dict.fromkeys(range(len(batch.messages)), _LATE) if batch.late else {}
        if not batch.late:
            decoded = self.decoder(batch.messages)
            refused = decoded.refused
            if decoded.rows.num_rows:
                yield decoded.rows
        stage = "late" if batch.late else "message"
        letters = [letter(self.topic, batch.messages[i], stage, why) for i, why in refused.items()]
        yield beam.pvalue.TaggedOutput("receipts", outcome(None, letters, batch.covers, batch.ids))


class LabelChosen(_OneThread):
    """Label the rows that `SelectExamples` has chosen; `DecodeMessages` has accounted for their messages."""

    def __init__(self, labelling: Labelling, topic: str) -> None:
        self.labelling, self.topic = labelling, topic

    def process(self, batch: pa.RecordBatch) -> Iterator[Outcome]:
        rows = pa.Table.from_batches([batch])
        labelled = self.labelling(rows)
        places = zip(rows[PARTITION].to_pylist(), rows[OFFSET].to_pylist(), strict=True)
        names = rows[MESSAGE].to_pylist() if MESSAGE in rows.column_names else [""] * rows.num_rows
        messages = [
            Message(partition, offset, UNKNOWN, None, None, id=name)
            for (partition, offset), name in zip(places, names, strict=True)
        ]
        letters = failures_to_letters(self.topic, labelled, messages)
        yield outcome(labels_of(labelled, rows), letters, ())


def outcome(
    labels: pa.Table | None,
    letters: Sequence[dict[str, Any]],
    covers: tuple[tuple[int, int, int], ...],
    ids: tuple[str, ...] = (),
) -> Outcome:
    """Make an outcome, with the hash of what it accounts for."""
    told: list[object] = [covers, [(item["partition"], item["offset"], item["key"]) for item in letters]]
    if ids:
        told.append(ids)
    elif labels is not None and not covers:  # nothing else tells its rows from others
        told.append(row_names(labels))
    digest = hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()
    return Outcome(labels, tuple(letters), covers, digest, ids=ids)


def nothing(empty: tuple[float, float]) -> Outcome:
    """Make the outcome of windows that have passed without a message."""
    return Outcome(None, (), (), hashlib.blake2b(repr(empty).encode(), digest_size=16).hexdigest(), empty)


def row_names(labels: pa.Table) -> list[str]:
    """Name labelled rows by what a repetition asks again: all by their messages' places, or each by its and its message's id."""
    if PARTITION in labels.column_names:
        ordered = sorted_by_place(labels)
        places = b"".join(ordered[name].to_numpy().tobytes() for name in (PARTITION, OFFSET))
        return [hashlib.blake2b(places, digest_size=16).hexdigest()]
    columns = [labels[name].to_pylist() for name in ("example_id", MESSAGE) if name in labels.column_names]
    return [repr(values) for values in zip(*columns, strict=True)]


def labels_of(labelled: Labelled, rows: pa.Table) -> pa.Table | None:
    """Return the labels of rows with the places of their messages, where the source has places; None without a label."""
    if not len(labelled.good):
        return None
    labels = labelled.table
    placed = rows[PARTITION][0].as_py() != UNKNOWN
    if labelled.bad:
        rows = rows.take(labelled.good)
    for name in (PARTITION, OFFSET) if placed else (MESSAGE,) if MESSAGE in rows.column_names else ():
        labels = labels.append_column(rows.schema.field(name), rows[name])
    return labels


def failures_to_letters(topic: str, labelled: Labelled, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Make the dead letters of rows that have no label.

    Args:
      topic: the topic.
      labelled: what became of the rows.
      messages: the messages that they were, in their order.
    """
    return [
        {
            **letter(topic, messages[row], failure["stage"], failure["error"], failure["attempts"]),
            "example_id": _text(failure["example_id"]),
        }
        for row, failure in zip(labelled.bad, labelled.failures, strict=True)
    ]


def letter(topic: str, message: Message, stage: str, error: str, attempts: int = 0) -> dict[str, Any]:
    """Make the dead letter of a message."""
    return {
        "topic": topic,
        "partition": message.partition,
        "offset": message.offset,
        "timestamp_ms": message.timestamp_ms,
        "key": message.key,
        "value": message.value,
        "headers": [{"name": name, "value": value} for name, value in message.headers],
        "example_id": None,
        "stage": stage,
        "error": plain(error),
        "attempts": attempts,
        "message_id": message.id or None,
    }


def _text(example_id: Any) -> str | None:
    return example_id.hex() if isinstance(example_id, bytes) else example_id


def sorted_by_place(labels: pa.Table) -> pa.Table:
    """Put rows into the order of their messages, whatever bundles they came in."""
    if PARTITION not in labels.column_names:
        return labels
    places = (labels[OFFSET].to_numpy(), labels[PARTITION].to_numpy())
    return labels.take(np.lexsort(places))
