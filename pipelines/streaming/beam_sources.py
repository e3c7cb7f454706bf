"""Messages by Beam's own connectors, `kafka-java:` and, on Dataflow, `pubsub:`, at the times of their events.

The watermark of these sources is the runner's: nobody outside of it knows when a window takes nothing any more. So that the
runner drops no message behind our back, its windows stay open for as long as a source may keep a message (`_KEPT_S`), and what
comes when its window was closed is a pane of its own. What is too late is decided here, by the message alone, so that a
repetition decides alike: its window ended longer than the allowed lateness before the message was sent.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.transforms.window import TimestampedValue

from distilbeam.pipelines.streaming.decode import Decoder
from distilbeam.pipelines.streaming.kafka_client import Topic, parse_place
from distilbeam.pipelines.streaming.kafka_reader import event_time_s
from distilbeam.pipelines.streaming.message import UNKNOWN, Message, MessageBatch
from distilbeam.pipelines.streaming.pubsub_reader import to_message
from distilbeam.pipelines.streaming.settings import StreamSettings

_KEPT_S = 31 * 86_400.0  # the longest that Pub/Sub keeps a message


def read_messages(pipeline: Any, settings: StreamSettings) -> tuple[Any, str]:
    """Read messages; return them and what they come from."""
    if settings.kind == "pubsub":
        from apache_beam.io.gcp.pubsub import ReadFromPubSub

        read = ReadFromPubSub(subscription=settings.place, with_attributes=True)
        return pipeline | "ReadMessages" >> read | "Messages" >> beam.Map(_of_pubsub), settings.place
    from apache_beam.io.kafka import ReadFromKafka

    topic: Topic = parse_place(settings.place, settings.consumer)
    consumer = {"bootstrap.servers": topic.brokers, "isolation.level": "read_committed", **dict(topic.settings)}
    read = ReadFromKafka(consumer, [topic.name], with_metadata=True)
    return pipeline | "ReadMessages" >> read | "Messages" >> beam.Map(_of_java), topic.name


def runners_lateness_s(settings: StreamSettings) -> float:
    """Return how long the runner is to keep a window open."""
    return _KEPT_S + settings.allowed_lateness_s + settings.window_s


class StampMessages(beam.DoFn):
    """Put messages to the times of their events; give each with whether it is too late.

    Args:
      window_s: length of a window in seconds.
      lateness_s: the allowed lateness.
      clock: says when a message's event was; None for the message's own time.
    """

    def __init__(self, window_s: float, lateness_s: float, clock: Decoder | None) -> None:
        self.window_s, self.lateness_s, self.clock = window_s, lateness_s, clock

    def process(self, message: Message) -> Iterator[TimestampedValue]:
        now = time.time()
        sent_s = message.timestamp_ms / 1000 if message.timestamp_ms != UNKNOWN else now
        time_s = event_time_s(message, self.clock, now)
        ends_s = (time_s // self.window_s + 1) * self.window_s
        late = ends_s + self.lateness_s <= sent_s or ends_s + self.lateness_s + _KEPT_S <= now
        yield TimestampedValue((message, late), now if late else time_s)  # a dead letter, in a window that is open


def gathered(messages: Iterable[tuple[Message, bool]]) -> Iterator[MessageBatch]:
    """Make batches of messages that `StampMessages` has told apart."""
    messages = list(messages)
    for late in (False, True):
        same = tuple(message for message, is_late in messages if is_late == late)
        if same:
            covers = tuple((m.partition, m.offset, m.offset) for m in same if m.partition != UNKNOWN)
            yield MessageBatch(same, covers, late)


def _of_pubsub(raw: Any) -> Message:
    return to_message(raw, "")  # Dataflow itself sees to it that a message comes once


def _of_java(record: Any) -> Message:
    headers = tuple((header.key, header.value) for header in record.headers or ())
    return Message(record.partition, record.offset, record.timestamp, record.key, record.value, headers)
