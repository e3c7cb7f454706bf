"""Schemas of a registry over real HTTP; the messages are what confluent-kafka's own serializers wrote, as bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from schema_registry import SchemaRegistry, schema_registry

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.pipelines.streaming import registry as client
from distilbeam.pipelines.streaming.decode import Decoder, make_decoder
from distilbeam.pipelines.streaming.message import Message
from distilbeam.pipelines.streaming.registry import Registry

X = [0.5, 1.0, 2.0, -3.0]
AT_MS = 1_769_824_800_000
# AvroSerializer and ProtobufSerializer of confluent-kafka 2.16.1: schema 1, and types Other.Row and Other of schema 2
AVRO = bytes.fromhex("00000000010261080000003f0000803f00000040000040c00080b4ba9c8267")
ROW = bytes.fromhex("00000000020400000a016112100000003f0000803f00000040000040c0")
OTHER = bytes.fromhex("0000000002000805")
FILE = bytes.fromhex(
    "0a09726f772e70726f746f120473686f701a1f676f6f676c652f70726f746f6275662f74696d657374616d702e70726f746f225b0a054f74686572"
    "12090a016e1801200128031a470a03526f77120b0a036b657918012001280912090a017818022003280212280a0473656e7418032001280b321a2e"
    "676f6f676c652e70726f746f6275662e54696d657374616d70620670726f746f33"
)
FIELDS: list[dict[str, Any]] = [
    {"name": "key", "type": "string"},
    {"name": "x", "type": {"type": "array", "items": "float"}},
    {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
]


@pytest.fixture
def server() -> Iterator[SchemaRegistry]:
    pytest.importorskip("fastavro", reason="needs the extra kafka")
    with schema_registry() as registry:
        row = {"type": "record", "name": "Row", "fields": FIELDS}
        registry.add("t-value", {"schema": json.dumps(row), "schemaType": "AVRO"})
        registry.add("p-value", {"schema": "syntax = ...", "schemaType": "PROTOBUF"}, FILE)
        yield registry


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSE_S", 0.01)


def message(value: bytes | None, offset: int = 0) -> Message:
    return Message(0, offset, 1_000, b"k", value)


def decoder(server: SchemaRegistry, format_: str, schema: str = "key:string,x:float32[4]", name: str = "") -> Decoder:
    return make_decoder(schema, format_, None, name, "", Registry.of(server.address, ()))


def test_avro_by_the_number_of_each_message(server: SchemaRegistry) -> None:
    decoded = decoder(server, "avro", "key:string,x:float32[4],at:int64")([message(AVRO, i) for i in range(3)])
    assert decoded.rows["key"].to_pylist() == ["a"] * 3
    assert decoded.rows["at"].to_pylist() == [AT_MS] * 3
    np.testing.assert_array_equal(make_input(InputConfig(columns=("x",)))(decoded.rows), [X] * 3)
    assert server.asked == ["/schemas/types", "/schemas/ids/1"], "a schema is asked for once"


def test_an_avro_schema_that_refers_to_others(server: SchemaRegistry) -> None:
    import io

    import fastavro

    point = {"type": "record", "name": "Point", "namespace": "shop", "fields": [FIELDS[1]]}
    server.add("point", {"schema": json.dumps(point), "schemaType": "AVRO"})
    row = {"type": "record", "name": "Row", "fields": [FIELDS[0], {"name": "p", "type": "shop.Point"}]}
    reference = {"name": "shop.Point", "subject": "point", "version": 1}
    number = server.add("row", {"schema": json.dumps(row), "schemaType": "AVRO", "references": [reference]})
    named: dict[str, Any] = {}
    fastavro.parse_schema(point, named_schemas=named)
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(row, named_schemas=named), {"key": "a", "p": {"x": X}})
    value = b"\0" + number.to_bytes(4, "big") + stream.getvalue()
    assert decoder(server, "avro", "key:string")([message(value)]).rows["key"].to_pylist() == ["a"]


def test_protobuf_by_number_and_place(server: SchemaRegistry) -> None:
    decoded = decoder(server, "protobuf")([message(ROW)])
    assert decoded.rows["key"].to_pylist() == ["a"]
    np.testing.assert_array_equal(make_input(InputConfig(columns=("x",)))(decoded.rows), [X])
    assert decoder(server, "protobuf", "n:int64")([message(OTHER)]).rows["n"].to_pylist() == [5]
    one_kind = decoder(server, "protobuf", "n:int64", "shop.Other")([message(ROW, 0), message(OTHER, 1)])
    assert one_kind.refused == {0: "a Protobuf shop.Other.Row, not shop.Other"}
    assert one_kind.good == (1,)


@pytest.mark.parametrize(
    ("format_", "value", "reason"),
    [
        ("avro", None, "the message has no value (a tombstone)"),
        ("avro", b'{"key": "a"}', "the message does not begin with a schema registry's zero byte and number"),
        ("avro", b"\0\0\0", "the message does not begin with a schema registry's zero byte and number"),
        ("avro", b"\0\0\0\0\x09\x02a", "the registry has no schema 9"),
        ("avro", ROW, "schema 2 of the registry is PROTOBUF, not AVRO"),
        ("avro", AVRO[:-3], "not Avro of the schema: "),
        ("avro", AVRO + b"x", "not Avro of the schema: bytes are left over"),
        ("protobuf", AVRO, "schema 1 of the registry is AVRO, not PROTOBUF"),
        ("protobuf", ROW[:5], "the message names a Protobuf message type that is not in its schema"),
        ("protobuf", ROW[:5] + b"\x02\x0a", "the message names a Protobuf message type that is not in its schema"),
        ("protobuf", ROW[:5] + b"\x02\x01", "the message names a Protobuf message type that is not in its schema"),
        ("protobuf", ROW[:-2], "not a Protobuf shop.Other.Row: "),
    ],
)
def test_messages_that_are_refused(server: SchemaRegistry, format_: str, value: bytes | None, reason: str) -> None:
    good = AVRO if format_ == "avro" else ROW
    decoded = decoder(server, format_)([message(good, 0), message(value, 1), message(good, 2)])
    assert decoded.good == (0, 2)
    assert decoded.refused[1].startswith(reason)


def test_a_registry_that_is_away_for_a_moment_is_asked_again_and_refuses_no_message(server: SchemaRegistry) -> None:
    made = decoder(server, "avro")
    server.failures = 2
    assert made([message(AVRO)]).good == (0,)
    other = decoder(server, "protobuf")
    server.failures = 3
    with pytest.raises(OSError, match=r"the schema registry at http://\S+ refuses schema 2: 503 Service Unavailable"):
        other([message(ROW)])
    assert other([message(ROW)]).good == (0,), "which is not remembered"


def test_what_is_wrong_is_said_before_the_first_message(server: SchemaRegistry, tmp_path: Path) -> None:
    for address, settings, sentence in (
        ("registry:8081", (), "--registry takes http://HOST:PORT or https://HOST, got 'registry:8081'"),
        (server.address, ("sasl.password=x",), "--registry-client: sasl.password is not known; it takes basic.auth"),
        (server.address, ("secret",), "--registry-client takes KEY=VALUE or @FILE, got 'secret'"),
        ("http://127.0.0.1:1", (), "--registry: no schema registry answers at http://127.0.0.1:1: .*refused"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_decoder("key:string", "avro", None, "", "", Registry.of(address, settings))
    with pytest.raises(ValueError, match="--definition or --registry must be given for --format avro, and not both"):
        make_decoder("key:string", "avro", tmp_path / "a", "", "", Registry.of(server.address, ()))
    with pytest.raises(ValueError, match="--registry is for avro and protobuf alone, got --format json"):
        make_decoder("key:string", "json", None, "", "", Registry.of(server.address, ()))


def test_a_password_is_sent_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "client").write_text("basic.auth.user.info=me:secret\n")
    with schema_registry("me:secret") as server:
        server.add("t-value", {"schema": json.dumps({"type": "record", "name": "Row", "fields": FIELDS})})
        known = Registry.of(server.address, (f"@{tmp_path / 'client'}",))
        assert "secret" not in repr(known)
        made = make_decoder("key:string", "avro", None, "", "", known)
        assert made([message(AVRO)]).good == (0,)
        with pytest.raises(ValueError, match=r"--registry: no schema registry answers at \S+: 401 Unauthorized"):
            make_decoder("key:string", "avro", None, "", "", Registry.of(server.address, ()))
