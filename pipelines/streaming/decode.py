"""Messages to rows: JSON objects, raw bytes, Avro and Protobuf, with what stands beside a message's value as columns.

A column of the schema is a field of the value unless an origin says otherwise: `key`, `value` (the raw bytes), `timestamp`
(int64, milliseconds), `partition`, `offset` (int64) or `header.NAME`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import pyarrow as pa

from distilbeam.pipelines.ingest.columns import ColumnType
from distilbeam.pipelines.streaming.event_time import refusal, require_time, seconds_of
from distilbeam.pipelines.streaming.message import MESSAGE, OFFSET, PARTITION, Message
from distilbeam.pipelines.streaming.registry import Registry
from distilbeam.pipelines.streaming.schemas import Parse, avro, avro_by_registry, protobuf, protobuf_by_registry
from distilbeam.pipelines.transforms.messages import parse_message, parse_schema, rows_to_batch

FORMATS = ("json", "bytes", "avro", "protobuf")
_BESIDE = {"key": ("string", "binary"), "value": ("string", "binary"), "header": ("string", "binary")}
_NUMBERS = {"timestamp": "timestamp_ms", "partition": "partition", "offset": "offset"}


@dataclass(frozen=True)
class Decoded:
    """The rows of a batch of messages.

    Attributes:
      rows: the rows, with the columns of the schema, `source_partition` and `source_offset`, and `source_message` where the
        messages have ids.
      good: which messages they are, in their order.
      refused: why the others are none, by their number.
    """

    rows: pa.RecordBatch
    good: tuple[int, ...]
    refused: dict[int, str]


@dataclass(frozen=True)
class Decoder:
    """How messages become rows.

    Attributes:
      schema: the columns, as `--schema` writes them.
      format: of the value: "json", "bytes", "avro" or "protobuf".
      definition: text of the Avro schema, or the Protobuf descriptor set in hexadecimal digits.
      message: full name of the Protobuf message.
      event_time: column that says when a message's event was, or "".
      registry: the schema registry that describes each message, or None.
    """

    schema: str
    format: str = "json"
    definition: str = ""
    message: str = ""
    event_time: str = ""
    registry: Registry | None = None

    def __call__(self, messages: Sequence[Message]) -> Decoded:
        """Decode messages; what is no row is refused with a reason, whatever it is.

        Raises:
          OSError: the schema registry does not answer.
        """
        types, origins = parse_columns(self.schema)
        parse = self._parse
        beside = [(name, _getter(origin, types[name])) for name, origin in origins]
        refused: dict[int, str] = {}
        rows, numbers = [], []
        for i, message in enumerate(messages):
            row, reason = parse(message.value)
            if row is None:
                refused[i] = reason
                continue
            for name, get in beside:
                row[name] = get(message)
            if self.event_time and seconds_of(row.get(self.event_time), types[self.event_time]) is None:
                refused[i] = refusal(self.event_time, types[self.event_time], row.get(self.event_time))
                continue
            rows.append(row)
            numbers.append(i)
        batch, wrong = rows_to_batch(rows, types)
        refused |= {numbers[i]: reason for i, reason in wrong.items()}
        good = tuple(i for i in numbers if i not in refused) if refused else tuple(numbers)
        kept = messages if len(good) == len(messages) else [messages[i] for i in good]
        batch = batch.append_column(PARTITION, pa.array([message.partition for message in kept], pa.int32()))
        batch = batch.append_column(OFFSET, pa.array([message.offset for message in kept], pa.int64()))
        if messages and messages[0].id:
            batch = batch.append_column(MESSAGE, pa.array([message.id for message in kept], pa.string()))
        return Decoded(batch, good, refused)

    @property
    def _parse(self) -> Parse:
        return _parser(self.format, self.definition, self.message, self.registry)

    def time_s(self, message: Message) -> float | None:
        """Return when a message's event was, in seconds since 1970, as its column says; None where there is no such time."""
        types, origins = parse_columns(self.schema)
        name = self.event_time
        origin = dict(origins).get(name)
        if origin is not None:
            return seconds_of(_getter(origin, types[name])(message), types[name])
        row, _ = self._parse(message.value)
        return None if row is None else seconds_of(row.get(name), types[name])


@lru_cache(maxsize=16)
def parse_columns(text: str) -> tuple[dict[str, ColumnType], tuple[tuple[str, str], ...]]:
    """Read a schema with origins, `id:string=key,x:float32[64],lang:string=header.lang`.

    Returns:
      The columns' types, and pairs of a column and its origin for those that are no field of the value.

    Raises:
      ValueError: see `parse_schema`; an unknown origin, or a type that it cannot have.
    """
    plain, origins = [], []
    for part in _split(text):
        column, equals, origin = part.partition("=")
        plain.append(column)
        if equals:
            origins.append((column.partition(":")[0].strip(), origin.strip()))
    types = parse_schema(",".join(plain))
    for name, origin in origins:
        kind, _, header = origin.partition(".")
        known = origin in (*_NUMBERS, "key", "value") or (kind == "header" and header)
        if not known:
            raise ValueError(
                f"--schema: the origin of {name} must be key, value, timestamp, partition, offset or header.NAME, got '{origin}'"
            )
        allowed = ("int64",) if origin in _NUMBERS else _BESIDE[kind]
        if types[name].kind not in allowed:
            raise ValueError(
                f"--schema: {name} comes from the message's {origin} and must be {' or '.join(allowed)}, got {types[name].kind}"
            )
    for name in (PARTITION, OFFSET, MESSAGE):
        if name in types:
            raise ValueError(f"--schema: {name} is a column of ours; give yours another name")
    return types, tuple(origins)


def make_decoder(
    schema: str,
    format_: str,
    definition: Path | None,
    message: str,
    event_time: str = "",
    registry: Registry | None = None,
) -> Decoder:
    """Check what describes the messages and gather it as plain text that travels to workers.

    Args:
      schema: the columns.
      format_: of the values.
      definition: file of the Avro schema (JSON) or the Protobuf descriptor set (`protoc --descriptor_set_out`).
      message: full name of the Protobuf message.
      event_time: column that says when a message's event was, or "".
      registry: the schema registry that describes them instead of a file.

    Raises:
      ValueError: an unknown format, a file that is missing or not of its kind, or columns that the format does not have.
    """
    if format_ not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got '{format_}'")
    types, origins = parse_columns(schema)
    if event_time:
        require_time(event_time, types)
    fields = sorted(set(types) - {name for name, _ in origins})
    if format_ == "bytes" and fields:
        raise ValueError(
            f"--format bytes has no fields: {fields[0]} needs an origin in --schema, such as {fields[0]}:{types[fields[0]].kind}=value"
        )
    _require_description(format_, definition, registry)
    if (message and format_ != "protobuf") or (format_ == "protobuf" and not message and registry is None):
        raise ValueError("--message names the Protobuf message and is given with --format protobuf, and only with it")
    text = ""
    if definition is not None:
        content = definition.read_bytes()
        text = content.hex() if format_ == "protobuf" else content.decode()
    try:
        _parser(format_, text, message, registry)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"--definition: {definition} cannot be read as {format_}: {e}") from e
    return Decoder(schema, format_, text, message, event_time, registry)


def _require_description(format_: str, definition: Path | None, registry: Registry | None) -> None:
    given = [name for name, value in (("--definition", definition), ("--registry", registry)) if value is not None]
    if format_ not in ("avro", "protobuf"):
        if given:
            raise ValueError(f"{given[0]} is for avro and protobuf alone, got --format {format_}")
    elif len(given) != 1:
        raise ValueError(f"--definition or --registry must be given for --format {format_}, and not both")
    if registry is not None:
        registry.require_answer(format_.upper())


def _split(text: str) -> list[str]:
    """Split at commas that are not in brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _getter(origin: str, type_: ColumnType) -> Callable[[Message], Any]:
    """Return what takes an origin's value from a message."""
    if origin in _NUMBERS:
        return attrgetter(_NUMBERS[origin])
    header = origin.removeprefix("header.")
    if header != origin:
        return lambda message: _value(dict(message.headers).get(header), type_)
    return lambda message: _value(message.key if origin == "key" else message.value, type_)


def _value(value: bytes | None, type_: ColumnType) -> Any:
    if value is None or type_.kind == "binary":
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


@lru_cache(maxsize=16)
def _parser(format_: str, definition: str, message: str, registry: Registry | None) -> Parse:
    if format_ == "json":
        return parse_message
    if format_ == "bytes":
        return _nothing
    if registry is not None:
        return avro_by_registry(registry) if format_ == "avro" else protobuf_by_registry(registry, message)
    return avro(definition) if format_ == "avro" else protobuf(definition, message)


def _nothing(_: bytes | None) -> tuple[dict[str, Any] | None, str]:
    return {}, ""
