"""What is asked of a Kafka cluster while a topic is read: where partitions end now, and how far behind the labels are."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from distilbeam.pipelines.streaming.kafka_client import Topic
from distilbeam.pipelines.streaming.offsets import Offsets

_END_ANSWER_S = 2.0
_AFTER_ERROR_S = 1.0


class Ends:
    """Asks the brokers where partitions end, without waiting: a consumer's own question would wait behind its fetches.

    Args:
      topic: the topic.
    """

    def __init__(self, topic: Topic) -> None:
        self.topic = topic
        self._admin: Any = None
        self._not_before = -float("inf")
        self._asked_s = 0.0
        self._pending: dict[int, Any] = {}

    def ask(self, partitions: Iterable[int]) -> bool:
        """Ask; nothing where an answer is outstanding, or the brokers did not answer a moment ago."""
        from confluent_kafka import IsolationLevel, TopicPartition
        from confluent_kafka.admin import AdminClient, OffsetSpec

        if self._pending or time.monotonic() < self._not_before:
            return False
        if self._admin is None:
            self._admin = AdminClient(self.topic.client_settings())
        wanted = {TopicPartition(self.topic.name, number): OffsetSpec.latest() for number in partitions}
        committed = self.topic.consumer_settings()["isolation.level"] == "read_committed"
        level = IsolationLevel.READ_COMMITTED if committed else IsolationLevel.READ_UNCOMMITTED
        self._asked_s = time.time()
        found = self._admin.list_offsets(wanted, isolation_level=level, request_timeout=_END_ANSWER_S)
        self._pending = {place.partition: answer for place, answer in found.items()}
        return True

    def answers(self) -> dict[int, tuple[int, float]]:
        """Return, by partition, its end and when it was asked for; those that did not answer are left out."""
        if not all(answer.done() for answer in self._pending.values()):
            return {}
        done, self._pending = self._pending, {}
        if any(answer.exception() is not None for answer in done.values()):
            # the client keeps the leader epochs of before, with which a broker that has come back refuses it for ever
            self._admin, self._not_before = None, time.monotonic() + _AFTER_ERROR_S
        ends = {p: answer.result().offset for p, answer in done.items() if answer.exception() is None}
        # a broker that is only just making the topic answers -1001, "not known", without an error: it is no end
        return {partition: (end, self._asked_s) for partition, end in ends.items() if end >= 0}


class Lag:
    """Follows how many messages of each partition are not settled, and tells the consumer group, where one is named.

    The group's offsets are for lag monitors: no job reads them.

    Args:
      topic: the topic.
      every_s: seconds between two questions.
    """

    def __init__(self, topic: Topic, every_s: float) -> None:
        from confluent_kafka import Consumer

        self.topic, self.every_s = topic, every_s
        self.by_partition: dict[int, int] = {}
        self._consumer: Any = Consumer(topic.consumer_settings())
        self._asked = -float("inf")
        self._told: dict[int, int] = {}

    def look(self, settled: Offsets) -> None:
        """Ask the brokers for the ends, no oftener than every `every_s`; a broker that does not answer changes nothing."""
        from confluent_kafka import KafkaException, TopicPartition

        if time.monotonic() - self._asked < self.every_s:
            return
        self._asked = time.monotonic()
        try:
            partitions = self._consumer.list_topics(self.topic.name, timeout=1.0).topics[self.topic.name].partitions
            for number in partitions:
                place = TopicPartition(self.topic.name, number)
                low, end = self._consumer.get_watermark_offsets(place, timeout=1.0, cached=False)
                self.by_partition[number] = sum(b - a + 1 for a, b in settled.missing(number, low, end))
            if self.topic.group is not None:
                self._tell(settled)
        except KafkaException:
            return

    def hurry(self) -> None:
        """Ask at the next look, whenever that is."""
        self._asked = -float("inf")

    def _tell(self, settled: Offsets) -> None:
        from confluent_kafka import TopicPartition

        now = {number: settled.first_missing(number, 0) for number in self.by_partition}
        changed = {number: offset for number, offset in now.items() if offset and self._told.get(number) != offset}
        if changed:
            places = [TopicPartition(self.topic.name, number, offset) for number, offset in changed.items()]
            self._consumer.commit(offsets=places, asynchronous=False)
            self._told |= changed

    def close(self) -> None:
        """Close the connection."""
        self._consumer.close()
