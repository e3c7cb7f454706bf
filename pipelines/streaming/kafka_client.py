"""What the job asks a Kafka cluster outside of reading: whether the topic is there, its partitions, their ends, the lag.

All errors of the client become one sentence; settings are librdkafka's own and are passed through.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distilbeam.pipelines.streaming.offsets import Offsets

ANSWER_S = 15.0  # how long a cluster may take to answer at the start
_END_ANSWER_S = 2.0
_AFTER_ERROR_S = 1.0
_OURS = {"enable.auto.commit": "false", "enable.auto.offset.store": "false", "enable.partition.eof": "true"}
_DEFAULTS = {
    "isolation.level": "read_committed",
    "auto.offset.reset": "earliest",  # of a position that the topic has deleted
    "queued.max.messages.kbytes": "65536",  # bounds what is fetched ahead
    "fetch.queue.backoff.ms": "20",  # the client's second of rest after its queue was full is longer than the queue lasts
    "log_level": "2",
}


@dataclass(frozen=True)
class Topic:
    """A topic of a cluster and how to read it.

    Attributes:
      brokers: addresses, separated by commas.
      name: the topic.
      settings: further settings of librdkafka, as pairs.
    """

    brokers: str
    name: str
    settings: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # may hold a password

    def consumer_settings(self) -> dict[str, str]:
        """Return the consumer's whole settings; the user's come before our defaults, ours where it must be so before his."""
        group = {"group.id": "distilbeam"}  # the client wants a name even where nobody joins a group
        return {**group, **_DEFAULTS, **dict(self.settings), **_OURS, "bootstrap.servers": self.brokers}

    def client_settings(self) -> dict[str, str]:
        """Return the settings of a client that reads nothing, which knows none of a consumer's."""
        consumers = {*_OURS, *_DEFAULTS, "group.id"} - {"log_level"}
        return {name: value for name, value in self.consumer_settings().items() if name not in consumers}

    @property
    def group(self) -> str | None:
        """The consumer group that is told what is settled, where one is named."""
        return dict(self.settings).get("group.id")


def parse_place(place: str, settings: Sequence[str]) -> Topic:
    """Read `HOST:PORT,...:TOPIC` and settings `KEY=VALUE` or `@FILE`, a file of such lines.

    Raises:
      ValueError: no topic, no broker, or a setting that is none or that the job sets by itself.
    """
    brokers, _, topic = place.rpartition(":")
    if not topic or not brokers or (topic.isdecimal() and ":" not in brokers):
        raise ValueError(f"--source takes kafka:HOST:PORT,...:TOPIC, got 'kafka:{place}'")
    pairs = parse_pairs("--consumer", settings)
    for key in pairs:
        if key in _OURS or key == "bootstrap.servers":
            raise ValueError(f"--consumer: {key} is set by the job itself, leave it out")
    return Topic(brokers, topic, tuple(sorted(pairs.items())))


def parse_pairs(option: str, settings: Sequence[str]) -> dict[str, str]:
    """Read settings of a client, each `KEY=VALUE` or `@FILE`, a file of such lines.

    Args:
      option: where they were given, for errors.
      settings: the settings.

    Raises:
      ValueError: one of another form, or a file that is not there.
    """
    return dict(_pair(option, line) for text in settings for line in _lines(option, text))


def _lines(option: str, text: str) -> list[str]:
    if not text.startswith("@"):
        return [text]
    if not Path(text[1:]).is_file():
        raise ValueError(f"{option}: there is no file {text[1:]}")
    lines = (line.strip() for line in Path(text[1:]).read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _pair(option: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"{option} takes KEY=VALUE or @FILE, got '{key}'")  # not its value, which may be a secret
    return key.strip(), value.strip()


@contextmanager
def connected(topic: Topic) -> Iterator[Any]:
    """Give a consumer that is assigned nothing, and close it.

    Raises:
      ValueError: a setting that the client does not know, or a value it refuses.
    """
    from confluent_kafka import Consumer, KafkaException

    try:
        consumer = Consumer(topic.consumer_settings())
    except KafkaException as e:
        raise ValueError(f"--consumer: the Kafka client refuses its settings: {e.args[0].str()}") from e
    try:
        yield consumer
    finally:
        consumer.close()


def ends_of(topic: Topic) -> dict[int, tuple[int, int]]:
    """Return for each partition the first offset that the topic still has, and the one after its last.

    Raises:
      ValueError: nobody answers, there is no such topic, or it may not be read.
    """
    from confluent_kafka import KafkaException, TopicPartition

    with connected(topic) as consumer:
        numbers = _partitions(consumer, topic)
        try:
            return {
                p: consumer.get_watermark_offsets(TopicPartition(topic.name, p), timeout=ANSWER_S, cached=False)
                for p in numbers
            }
        except KafkaException as e:
            raise ValueError(f"topic {topic.name} at {topic.brokers} cannot be read: {e.args[0].str()}") from e


def _partitions(consumer: Any, topic: Topic) -> list[int]:
    from confluent_kafka import KafkaException

    try:
        found = consumer.list_topics(topic.name, timeout=ANSWER_S).topics[topic.name]
    except KafkaException as e:
        raise ValueError(
            f"no Kafka broker answers at {topic.brokers} within {ANSWER_S:.0f} s ({e.args[0].str()}); check the address in "
            "--source, and --consumer security.protocol=... where the cluster wants TLS or SASL"
        ) from e
    if found.error is not None or not found.partitions:
        said = "it has no partitions" if found.error is None else found.error.str()
        raise ValueError(f"topic {topic.name} at {topic.brokers} cannot be read: {said}")
    return sorted(found.partitions)


def offsets_at(topic: Topic, time_ms: int, ends: Mapping[int, tuple[int, int]]) -> dict[int, int]:
    """Return for each partition the offset of its first message of a time or later, or its end."""
    from confluent_kafka import KafkaException, TopicPartition

    with connected(topic) as consumer:
        asked = [TopicPartition(topic.name, partition, time_ms) for partition in ends]
        try:
            found = consumer.offsets_for_times(asked, timeout=ANSWER_S)
        except KafkaException as e:
            raise ValueError(f"topic {topic.name} cannot be searched for a time: {e.args[0].str()}") from e
        return {part.partition: part.offset if part.offset >= 0 else ends[part.partition][1] for part in found}


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
