"""What a stream is made of between its steps: messages, batches of them, and what became of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

UNKNOWN = -1  # partition and offset of a message of a source that has none
PARTITION, OFFSET = "source_partition", "source_offset"  # int32 and int64, columns of a label
MESSAGE = "source_message"  # string, instead of these where messages have names and no places
AGAIN = "again"  # in a manifest entry: its rows were dead letters before


class Message(NamedTuple):
    """One message.

    Attributes:
      partition: its partition, or `UNKNOWN`.
      offset: its place there, or `UNKNOWN`.
      timestamp_ms: when it was sent or appended, in milliseconds since 1970.
      key: its key.
      value: its content; None is a tombstone.
      headers: pairs of a name and a value.
      id: what the source calls it, where that is not a partition and an offset, or "".
    """

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...] = ()
    id: str = ""


@dataclass(frozen=True)
class MessageBatch:
    """Messages of one window that are decoded and asked together.

    Attributes:
      messages: the messages.
      covers: intervals (partition, first, last) of the offsets that are settled when these messages are: their own and those
        before them that hold nothing to read, as compaction and transactions leave them.
      late: whether they came after their window was closed, so that nobody is to be asked.
      empty: start and end, in seconds since 1970, of windows that have passed without a message; the batch has none then.
    """

    messages: tuple[Message, ...]
    covers: tuple[tuple[int, int, int], ...] = ()
    late: bool = False
    empty: tuple[float, float] | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """The messages' ids, where they have any."""
        return tuple(message.id for message in self.messages if message.id)


@dataclass(frozen=True)
class Outcome:
    """What became of a batch of messages.

    Attributes:
      labels: labelled rows, or None.
      letters: a mapping for each message without a label; see `LETTERS`.
      covers: the offsets that are settled once this is committed.
      digest: hash that puts outcomes in an order of their own.
      empty: start and end of windows that have passed without a message.
      ids: ids of the messages that are settled once this is committed, where they have ids.
    """

    labels: pa.Table | None
    letters: tuple[dict[str, Any], ...]
    covers: tuple[tuple[int, int, int], ...]
    digest: str = field(default="")
    empty: tuple[float, float] | None = None
    ids: tuple[str, ...] = ()


LETTERS = pa.schema(
    [
        pa.field("topic", pa.string()),
        pa.field("partition", pa.int32()),
        pa.field("offset", pa.int64()),
        pa.field("timestamp_ms", pa.int64()),
        pa.field("key", pa.binary()),
        pa.field("value", pa.binary()),
        pa.field("headers", pa.list_(pa.struct([("name", pa.string()), ("value", pa.binary())]))),
        pa.field("example_id", pa.string()),
        pa.field("stage", pa.string()),  # message, late, input or teacher
        pa.field("error", pa.string()),
        pa.field("attempts", pa.int64()),
        pa.field("message_id", pa.string()),
    ]
)
