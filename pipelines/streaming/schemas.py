"""Avro and Protobuf values to mappings, by a definition in a file or by the schema that a registry has under a message's number."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from distilbeam.pipelines.streaming.registry import FRAME, Registry, number_of

Parse = Callable[[bytes | None], tuple[dict[str, Any] | None, str]]  # to a mapping, or None and why there is none
_TOMBSTONE = "the message has no value (a tombstone)"
_NO_NUMBER = "the message does not begin with a schema registry's zero byte and number"


def avro(definition: str) -> Parse:
    """Read values of one Avro schema (JSON), with a registry's frame before them or without.

    Raises:
      ValueError: the schema is no record.
    """
    import fastavro

    schema = fastavro.parse_schema(json.loads(definition))
    _require_record(schema)

    def parse(value: bytes | None) -> tuple[dict[str, Any] | None, str]:
        if value is None:
            return None, _TOMBSTONE
        found: tuple[dict[str, Any] | None, str] = None, ""
        for start in (FRAME, 0) if value[:1] == b"\0" else (0,):
            found = _read_avro(value[start:], schema)
            if found[0] is not None:
                break
        return found

    return parse


def avro_by_registry(registry: Registry) -> Parse:
    """Read Avro values, each by the schema that it names."""
    import fastavro

    @lru_cache(maxsize=1024)
    def schema_of(number: int) -> tuple[Any, str]:
        try:
            found = registry.avro(number)
            named: dict[str, Any] = {}
            for text in found["named"].values():
                fastavro.parse_schema(json.loads(text), named_schemas=named)
            schema = fastavro.parse_schema(found["schema"], named_schemas=named)
            _require_record(schema)
        except (LookupError, ValueError, TypeError) as e:
            return None, str(e)
        return schema, ""

    def parse(value: bytes | None) -> tuple[dict[str, Any] | None, str]:
        schema, payload, why = _named(value, schema_of)
        return (None, why) if schema is None else _read_avro(payload, schema)

    return parse


def protobuf(definition: str, message: str) -> Parse:
    """Read values of one Protobuf message type.

    Args:
      definition: a FileDescriptorSet in hexadecimal digits.
      message: full name of the message type.

    Raises:
      KeyError: the set has no such type.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(bytes.fromhex(definition)).file:
        pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName(message))

    def parse(value: bytes | None) -> tuple[dict[str, Any] | None, str]:
        return (None, _TOMBSTONE) if value is None else _read_protobuf(value, kind)

    return parse


def protobuf_by_registry(registry: Registry, message: str) -> Parse:
    """Read Protobuf values, each by the file and the place in it that it names.

    Args:
      registry: the registry.
      message: full name of the only message type that is read; "" reads any.
    """

    @lru_cache(maxsize=1024)
    def pool_of(number: int) -> tuple[Any, str]:
        try:
            return _pool(*registry.protobuf(number)), ""
        except (LookupError, ValueError, TypeError) as e:
            return None, str(e)

    @lru_cache(maxsize=1024)
    def kind_of(number: int, path: tuple[int, ...]) -> Any:
        from google.protobuf import message_factory

        pool, name = pool_of(number)[0]
        kinds: Iterable[Any] = pool.FindFileByName(name).message_types_by_name.values()
        found = None
        for place in path:
            found = list(kinds)[place]
            kinds = found.nested_types
        return message_factory.GetMessageClass(found)

    def parse(value: bytes | None) -> tuple[dict[str, Any] | None, str]:
        found, payload, why = _named(value, pool_of)
        if found is None or value is None:
            return None, why
        try:
            path, payload = _path(payload)
            kind = kind_of(number_of(value) or 0, path)
        except IndexError:
            return None, "the message names a Protobuf message type that is not in its schema"
        name = kind.DESCRIPTOR.full_name
        return (
            (None, f"a Protobuf {name}, not {message}") if message not in ("", name) else _read_protobuf(payload, kind)
        )

    return parse


def _named(value: bytes | None, found_by: Callable[[int], tuple[Any, str]]) -> tuple[Any, bytes, str]:
    """Find what belongs to the number before a value; return it with the rest of the value, or None and why."""
    if value is None:
        return None, b"", _TOMBSTONE
    number = number_of(value)
    if number is None:
        return None, b"", _NO_NUMBER
    found, why = found_by(number)
    return found, value[FRAME:], why


def _require_record(schema: Any) -> None:
    if not isinstance(schema, Mapping) or schema.get("type") != "record":
        raise ValueError("the schema must be a record")


def _read_avro(value: bytes, schema: Any) -> tuple[dict[str, Any] | None, str]:
    import fastavro

    stream = io.BytesIO(value)
    try:
        row: Any = fastavro.schemaless_reader(stream, schema, None)
    except (ValueError, KeyError, IndexError, EOFError, OverflowError, StopIteration, TypeError) as e:
        return None, f"not Avro of the schema: {f'{type(e).__name__} {e}'.strip()}"
    if stream.read(1) != b"":
        return None, "not Avro of the schema: bytes are left over"
    # timestamp-millis and its like: a column has the number that JSON would have
    return {k: int(v.timestamp() * 1000) if isinstance(v, datetime) else v for k, v in row.items()}, ""


def _read_protobuf(value: bytes, kind: Any) -> tuple[dict[str, Any] | None, str]:
    from google.protobuf.message import DecodeError

    try:
        read = kind.FromString(value)
    except DecodeError as e:
        return None, f"not a Protobuf {kind.DESCRIPTOR.full_name}: {e}"
    values = ((field, getattr(read, field.name)) for field in kind.DESCRIPTOR.fields)
    return {field.name: list(value) if field.is_repeated else value for field, value in values}, ""


def _pool(content: bytes, imported: Mapping[str, bytes]) -> tuple[Any, str]:
    """Make a pool of a file and those that it imports; return it with the file's name in it."""
    from google.protobuf import descriptor_pb2, descriptor_pool

    pool = descriptor_pool.DescriptorPool()
    added: set[str] = set()

    def add(name: str, content: bytes) -> None:
        if name in added:
            return
        added.add(name)
        file = descriptor_pb2.FileDescriptorProto.FromString(content)
        file.name = name
        for needed in file.dependency:
            add(needed, imported[needed] if needed in imported else _well_known(needed))
        pool.Add(file)

    name = "the schema of a message.proto"
    add(name, content)
    return pool, name


def _well_known(name: str) -> bytes:
    """Return a file of Protobuf's own, such as google/protobuf/timestamp.proto."""
    if not name.startswith("google/protobuf/"):
        raise LookupError(f"the registry does not say what {name} is")
    module = importlib.import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
    return bytes(module.DESCRIPTOR.serialized_pb)


def _path(payload: bytes) -> tuple[tuple[int, ...], bytes]:
    """Read the place of a message type in its file; a single zero byte is the first one.

    Raises:
      IndexError: it is cut off, or names a negative place.
    """
    stream = io.BytesIO(payload)
    count = _zigzag(stream)
    path = tuple(_zigzag(stream) for _ in range(count)) if count else (0,)
    if min(path, default=-1) < 0:
        raise IndexError
    return path, stream.read()


def _zigzag(stream: io.BytesIO) -> int:
    number, shift = 0, 0
    while True:
        byte = stream.read(1)[0]
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1)
