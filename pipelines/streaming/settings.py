"""The options of a streaming job, checked."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from distilbeam.settings import Section, validated

SOURCES = ("kafka", "kafka-java", "pubsub", "parquet", "letters")


class StreamSettings(Section):
    """What a streaming job is to do, besides the configuration of the labelling job."""

    model_config = ConfigDict(populate_by_name=True)  # `schema` is a method of pydantic's

    source: str = Field(description="kind:place")
    out: str = Field(min_length=1, description="the soft-label dataset")
    columns: str = Field("", alias="schema", description="columns of a message; Parquet files bring their own")
    id: Literal["key"] | None = Field(
        None, description="key: the message's key is the id; any other column is named in --schema"
    )
    dead_letters: str = Field("", description="folder of what has no label; beside the dataset where it is not given")
    window_s: float = Field(60.0, ge=0.1, description="length of a window in seconds")
    shards: int = Field(1, ge=1, description="shards of a window")
    start: Literal["resume", "earliest", "latest"] = Field(
        "resume", description="where reading begins: behind what is settled, at the topic's beginning or at its end"
    )
    until: str = Field(
        "",
        description="latest, for what the topic has now, or a time in ISO 8601, at which reading ends; without one it never does",
    )
    event_time: str = Field(
        "", description="column that says when a message's event was; without one it is the message's own time"
    )
    allowed_lateness_s: float = Field(
        60.0, ge=0, description="how long after its window's end a message is still labelled, in event time"
    )
    idle_s: float = Field(2.0, ge=0, description="how far behind the clock the time of an idle partition is")
    max_wait_s: float = Field(1.0, ge=0, description="seconds that messages wait for a batch to fill")
    max_rows: int = Field(0, ge=0, description="rows at which a window is written before it closes; 0 never does")
    max_failures: str = Field(
        "", description="dead letters at which the job ends: a number, or a share of the messages such as 5%"
    )
    format: Literal["json", "bytes", "avro", "protobuf"] = Field("json", description="of a message's value")
    definition: str = Field("", description="file that describes it")
    registry: str = Field("", description="address of the schema registry that describes it")
    registry_client: tuple[str, ...] = Field((), description="settings of the registry's client, KEY=VALUE or @FILE")
    message: str = Field("", description="name of the Protobuf message")
    consumer: tuple[str, ...] = Field((), description="settings of the Kafka client, KEY=VALUE or @FILE")

    @model_validator(mode="after")
    def _fits_source(self) -> Self:
        if self.kind not in SOURCES or not self.place:
            raise ValueError(f"source takes {', '.join(f'{name}:PLACE' for name in SOURCES)}, got '{self.source}'")
        if self.messages and not self.columns and self.id != "key":
            raise ValueError(
                f"schema must be given for messages from {self.kind}, such as --schema='key:string,x:float32[64]'"
            )
        if self.kind != "kafka":
            for name, value in (("start", self.start != "resume"), ("until", self.until), ("consumer", self.consumer)):
                if value and not (name == "consumer" and self.kind == "kafka-java"):
                    raise ValueError(f"{name} is for kafka: alone, leave it out for {self.kind}:")
        if self.event_time and not self.messages:
            raise ValueError(f"event_time is for messages, leave it out for {self.kind}:")
        self.until_ms()
        self.failures_allowed(0)
        return self

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
                f"until takes latest or a time such as 2026-01-31T02:00:00+00:00, got '{self.until}'"
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
            raise ValueError(f"max_failures takes a number or a share such as 5%, got '{self.max_failures}'")
        return number / 100 * max(messages, 100) if share else number

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> StreamSettings:
        """Make settings of options by their names; what is None keeps its default.

        Raises:
          ValueError: options that are not valid; a sentence for each, which begins with the option.
        """
        try:
            return validated(cls, {name: value for name, value in options.items() if value is not None})
        except ValueError as e:
            raise ValueError(re.sub(r"^\w+|(?<=did you mean )\w+", _option, str(e), flags=re.MULTILINE)) from e

    def definition_path(self) -> Path | None:
        """Return the file that describes the messages."""
        return Path(self.definition) if self.definition else None


def _option(name: re.Match[str]) -> str:
    return f"--{name.group().replace('_', '-')}"
