"""Messages to rows: JSON objects, raw bytes, Avro and Protobuf, with what stands beside a message's value as columns.

A column of the schema is a field of the value unless an origin says otherwise: `key`, `value` (the raw bytes), `timestamp`
(int64, milliseconds), `partition`, `offset` (int64) or `header.NAME`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from distilbeam.pipelines.ingest.columns import ColumnType
from distilbeam.pipelines.streaming.message import OFFSET, PARTITION, Message
from distilbeam.pipelines.transforms.messages import parse_message, parse_schema, rows_to_batch

FORMATS = ("json", "bytes", "avro", "protobuf")
_BESIDE = {"key": ("string", "binary"), "value": ("string", "binary"), "header": ("string", "binary")}
_NUMBERS = {"timestamp": "timestamp_ms", "partition": "partition", "offset": "offset"}
_FRAMED = 5  # bytes of the frame that schema registries put before a value: a zero and the schema's number


@dataclass(frozen=True)
class Decoded:
    """The rows of a batch of messages.

    Attributes:
      rows: the rows, with the columns of the schema, `source_partition` and `source_offset`.
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
    """

    schema: str
    format: str = "json"
    definition: str = ""
    message: str = ""

    def __call__(self, messages: Sequence[Message]) -> Decoded:
        """Decode messages; what is no row is refused with a reason, whatever it is."""
        types, origins = parse_columns(self.schema)
        parse = _parser(self.format, self.definition, self.message)
        refused: dict[int, str] = {}
        rows, numbers = [], []
        for i, message in enumerate(messages):
            row, reason = parse(message.value)
            if row is None:
                refused[i] = reason
                continue
            for name, origin in origins:
                row[name] = _beside(message, origin, types[name])
            rows.append(row)
            numbers.append(i)
        batch, wrong = rows_to_batch(rows, types)
        refused |= {numbers[i]: reason for i, reason in wrong.items()}
        good = tuple(i for i in numbers if i not in refused) if refused else tuple(numbers)
        kept = messages if len(good) == len(messages) else [messages[i] for i in good]
        batch = batch.append_column(PARTITION, pa.array([message.partition for message in kept], pa.int32()))
        batch = batch.append_column(OFFSET, pa.array([message.offset for message in kept], pa.int64()))
        return Decoded(batch, good, refused)


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
    for name in (PARTITION, OFFSET):
        if name in types:
            raise ValueError(f"--schema: {name} is a column of ours; give yours another name")
    return types, tuple(origins)


def make_decoder(schema: str, format_: str, definition: Path | None, message: str) -> Decoder:
    """Check what describes the messages and gather it as plain text that travels to workers.

    Args:
      schema: the columns.
      format_: of the values.
      definition: file of the Avro schema (JSON) or the Protobuf descriptor set (`protoc --descriptor_set_out`).
      message: full name of the Protobuf message.

    Raises:
      ValueError: an unknown format, a file that is missing or not of its kind, or columns that the format does not have.
    """
    if format_ not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got '{format_}'")
    types, origins = parse_columns(schema)
    fields = sorted(set(types) - {name for name, _ in origins})
    if format_ == "bytes" and fields:
        raise ValueError(
            f"--format bytes has no fields: {fields[0]} needs an origin in --schema, such as {fields[0]}:{types[fields[0]].kind}=value"
        )
    needs = format_ in ("avro", "protobuf")
    if needs != (definition is not None):
        rule = "must be given for" if needs else "is for avro and protobuf alone, got"
        raise ValueError(f"--definition {rule} --format {format_}")
    if (format_ == "protobuf") != bool(message):
        raise ValueError("--message names the Protobuf message and is given with --format protobuf, and only with it")
    text = ""
    if definition is not None:
        content = definition.read_bytes()
        text = content.hex() if format_ == "protobuf" else content.decode()
    try:
        _parser(format_, text, message)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"--definition: {definition} cannot be read as {format_}: {e}") from e
    return Decoder(schema, format_, text, message)


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


def _beside(message: Message, origin: str, type_: ColumnType) -> Any:
    if origin in _NUMBERS:
        return getattr(message, _NUMBERS[origin])
    if origin.startswith("header."):
        value = dict(message.headers).get(origin.removeprefix("header."))
    else:
        value = message.key if origin == "key" else message.value
    if value is None or type_.kind == "binary":
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        return None


_Parse = Callable[[bytes | None], tuple[dict[str, Any] | None, str]]


@lru_cache(maxsize=16)
def _parser(format_: str, definition: str, message: str) -> _Parse:
    if format_ == "json":
        return parse_message
    if format_ == "bytes":
        return _nothing
    return _avro(definition) if format_ == "avro" else _protobuf(definition, message)


def _nothing(_: bytes | None) -> tuple[dict[str, Any] | None, str]:
    return {}, ""


def _avro(definition: str) -> _Parse:
    import fastavro

    schema = fastavro.parse_schema(json.loads(definition))
    if not isinstance(schema, Mapping) or schema.get("type") != "record":
        raise ValueError("the schema must be a record")

    def parse(value: bytes | None) -> tuple[dict[str, Any] | None, str]:
        if value is None:
            return None, "the message has no value (a tombstone)"
        for start in (_FRAMED, 0) if value[:1] == b"\0" else (0,):
            stream = io.BytesIO(value[start:])
            try:
                row = fastavro.schemaless_reader(stream, schema)
            except (ValueError, KeyError, IndexError, EOFError, OverflowError, StopIteration, TypeError) as e:
                error = f"{type(e).__name__} {e}".strip()
                continue
            if stream.read(1) == b"":
                return row, ""
            error = "bytes are left over"
        return None, f"not Avro of the schema: {error}"

    return parse


def _protobuf(definition: str, message: str) -> _Parse:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
    from google.protobuf.message import DecodeError

    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(bytes.fromhex(definition)).file:
        pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName(message))
    names = [field.name for field in kind.DESCRIPTOR.fields]
    repeated = {field.name for field in kind.DESCRIPTOR.fields if field.is_repeated}

    def parse(value: bytes | None) -> tuple[dict[str, Any] | None, str]:
        if value is None:
            return None, "the message has no value (a tombstone)"
        try:
            read = kind.FromString(value)
        except DecodeError as e:
            return None, f"not a Protobuf {message}: {e}"
        return {name: list(getattr(read, name)) if name in repeated else getattr(read, name) for name in names}, ""

    return parse
