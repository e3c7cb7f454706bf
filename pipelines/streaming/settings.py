"""The options of a streaming job, checked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SOURCES = ("kafka", "kafka-java", "pubsub", "parquet", "letters")
STARTS = ("resume", "earliest", "latest")


@dataclass(frozen=True)
class StreamSettings:
    """What a streaming job is to do, besides the configuration of the labelling job.

    Attributes:
      source: `kind:place`.
      out: the soft-label dataset.
      schema: columns of a message; Parquet files bring their own.
      id: "key" where the message's key is the id, else "".
      dead_letters: folder of what has no label; beside the dataset where it is not given.
      window_s: length of a window in seconds.
      shards: shards of a window.
      start: where reading begins: behind what is settled, at the topic's beginning or at its end.
      until: "latest", for what the topic has now, or a time in ISO 8601, at which reading ends; "" goes on for ever.
      allowed_lateness_s: how long after its window's end a message is still labelled, in event time.
      idle_s: how far behind the clock the time of an idle partition is.
      max_wait_s: seconds that messages wait for a batch to fill.
      max_rows: rows at which a window is written before it closes; 0 never does.
      max_failures: dead letters at which the job ends: a number, or a share of the messages such as 5%; "" never does.
      format: of a message's value.
      definition: file that describes it.
      message: name of the Protobuf message.
      consumer: settings of the Kafka client, KEY=VALUE or @FILE.
    """

    source: str
    out: str
    schema: str = ""
    id: str = ""
    dead_letters: str = ""
    window_s: float = 60.0
    shards: int = 1
    start: str = "resume"
    until: str = ""
    allowed_lateness_s: float = 60.0
    idle_s: float = 2.0
    max_wait_s: float = 1.0
    max_rows: int = 0
    max_failures: str = ""
    format: str = "json"
    definition: str = ""
    message: str = ""
    consumer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in SOURCES or not self.place:
            raise ValueError(f"--source takes {', '.join(f'{name}:PLACE' for name in SOURCES)}, got '{self.source}'")
        for name, least in (("window_s", 0.1), ("shards", 1), ("idle_s", 0), ("max_wait_s", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("allowed_lateness_s", "max_rows"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}")
        if self.start not in STARTS:
            raise ValueError(f"--start must be one of {', '.join(STARTS)}, got '{self.start}'")
        if self.id not in ("", "key"):
            raise ValueError(
                f"--id takes key, for the messages' keys; any other column is named in --schema, got '{self.id}'"
            )
        if self.messages and not self.schema and self.id != "key":
            raise ValueError(
                f"--schema must be given for messages from {self.kind}, such as --schema='key:string,x:float32[64]'"
            )
        if self.kind != "kafka":
            for name, value in (("start", self.start != "resume"), ("until", self.until), ("consumer", self.consumer)):
                if value and not (name == "consumer" and self.kind == "kafka-java"):
                    raise ValueError(f"--{name} is for kafka: alone, leave it out for {self.kind}:")
        self.until_ms()
        self.failures_allowed(0)

    @property
    def kind(self) -> str:
        """The kind of source."""
        return self.source.partition(":")[0]

    @property
    def place(self) -> str:
        """Where the source is."""
        return self.source.partition(":")[2]

    @property
    def messages(self) -> bool:
        """Whether the source gives messages rather than files."""
        return self.kind != "parquet"

    @property
    def unbounded(self) -> bool:
        """Whether the source has no end."""
        if self.kind != "kafka":
            return self.kind in ("kafka-java", "pubsub")
        time_ms = self.until_ms()  # one that is yet to come is waited for
        return not self.until or (time_ms is not None and time_ms > time.time() * 1000)

    @property
    def letters(self) -> str:
        """The folder of dead letters."""
        return self.dead_letters or f"{self.out.rstrip('/')}-deadletter"

    def until_ms(self) -> int | None:
        """Return the time at which reading ends, in milliseconds since 1970, where one is given.

        Raises:
          ValueError: it is no time.
        """
        if self.until in ("", "latest"):
            return None
        try:
            moment = datetime.fromisoformat(self.until)
        except ValueError as e:
            raise ValueError(
                f"--until takes latest or a time such as 2026-01-31T02:00:00+00:00, got '{self.until}'"
            ) from e
        return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)

    def failures_allowed(self, messages: int) -> float | None:
        """Return how many dead letters a job that has settled so many messages may have; None is any number.

        A share counts from a hundred messages on: one bad message among the first two is not half of the stream.

        Raises:
          ValueError: it is neither a number nor a share.
        """
        if not self.max_failures:
            return None
        share = self.max_failures.endswith("%")
        try:
            number = float(self.max_failures.removesuffix("%"))
        except ValueError:
            number = -1.0
        if not number >= 0 or (share and number > 100):
            raise ValueError(f"--max-failures takes a number or a share such as 5%, got '{self.max_failures}'")
        return number / 100 * max(messages, 100) if share else number

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> StreamSettings:
        """Make settings of options by their names; what is None keeps its default."""
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in options.items() if name in known and value is not None}
        return cls(**{**given, "consumer": tuple(given.get("consumer", ()))})

    def definition_path(self) -> Path | None:
        """Return the file that describes the messages."""
        return Path(self.definition) if self.definition else None
