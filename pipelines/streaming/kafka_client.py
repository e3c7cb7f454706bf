"""What the job asks a Kafka cluster at its start: whether the topic is there and may be read, its partitions, their ends.

All errors of the client become one sentence; settings are librdkafka's own and are passed through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ANSWER_S = 15.0  # how long a cluster may take to answer at the start
_READABLE_S = 5.0  # how long an answer from a partition's end is waited for; without one reading is tried
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
def connected(topic: Topic, heard: Callable[[Any], None] = lambda error: None) -> Iterator[Any]:  # noqa: ARG005
    """Give a consumer that is assigned nothing, and close it.

    Args:
      topic: the topic.
      heard: is told of errors that are no answer to a question, when the consumer is polled.

    Raises:
      ValueError: a setting that the client does not know, or a value it refuses.
    """
    from confluent_kafka import Consumer, KafkaException

    try:
        consumer = Consumer({**topic.consumer_settings(), "error_cb": heard})
    except KafkaException as e:
        raise ValueError(f"--consumer: the Kafka client refuses its settings: {e.args[0].str()}") from e
    try:
        yield consumer
    finally:
        consumer.close()


def ends_of(topic: Topic) -> dict[int, tuple[int, int]]:
    """Return for each partition the first offset that the topic still has, and the one after its last.

    Raises:
      ValueError: nobody answers, there is no such topic, it may not be read, or the group may not be told.
    """
    from confluent_kafka import KafkaException, TopicPartition

    errors: list[Any] = []
    with connected(topic, errors.append) as consumer:
        numbers = _partitions(consumer, topic, errors)
        try:
            ends = {
                p: consumer.get_watermark_offsets(TopicPartition(topic.name, p), timeout=ANSWER_S, cached=False)
                for p in numbers
            }
            _require_readable(consumer, TopicPartition(topic.name, numbers[0], ends[numbers[0]][1]))
        except KafkaException as e:
            raise ValueError(f"topic {topic.name} at {topic.brokers} cannot be read: {e.args[0].str()}") from e
        if topic.group is not None:
            _require_group(topic, topic.group)
        return ends


def _require_readable(consumer: Any, end: Any) -> None:
    """Ask for what comes behind the end of a partition: who may see a topic may not always read it.

    Raises:
      KafkaException: it may not be read.
    """
    from confluent_kafka import KafkaError, KafkaException

    consumer.assign([end])
    stop = time.monotonic() + _READABLE_S
    while time.monotonic() < stop:
        found = consumer.poll(0.1)
        error = None if found is None else found.error()
        if error is not None and error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            raise KafkaException(error)
        if found is not None and (error is None or error.code() == KafkaError._PARTITION_EOF):
            break
    consumer.unassign()


def _require_group(topic: Topic, group: str) -> None:
    """Ask what a consumer group was told: who may not ask may not tell it either.

    Raises:
      ValueError: it may not be asked.
    """
    from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException
    from confluent_kafka.admin import AdminClient

    admin = AdminClient(topic.client_settings())
    asked = admin.list_consumer_group_offsets([ConsumerGroupTopicPartitions(group)], request_timeout=ANSWER_S)
    try:
        asked[group].result()
    except KafkaException as e:
        raise ValueError(
            f"--consumer: the group {group} cannot be told what is settled: {e.args[0].str()}; leave group.id out, or let this "
            "user read the group"
        ) from e


def _partitions(consumer: Any, topic: Topic, errors: list[Any]) -> list[int]:
    from confluent_kafka import KafkaError, KafkaException

    try:
        found = consumer.list_topics(topic.name, timeout=ANSWER_S).topics[topic.name]
    except KafkaException as e:
        consumer.poll(0)  # hears of the errors
        for error in errors:
            if error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL):
                raise ValueError(
                    f"the Kafka brokers at {topic.brokers} refuse the connection: {error.str()}; check the settings of --consumer"
                ) from e
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
