"""Beam's own Kafka connector, as far as the protocol: what is submitted to an expansion service, and what becomes of its records.

The service here speaks Beam's protocol and expands the connector's name to records of this test, with the columns that the
Java connector gives; no Java is run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import grpc
import pytest
import tomli_w
from apache_beam.coders import RowCoder
from apache_beam.io.kafka import ReadFromKafka
from apache_beam.portability.api import (
    beam_artifact_api_pb2_grpc,
    beam_expansion_api_pb2_grpc,
    external_transforms_pb2,
)
from apache_beam.runners.portability.expansion_service import ExpansionServiceServicer
from apache_beam.runners.worker.worker_pool_main import BeamFnExternalWorkerPoolServicer
from engines import SCHEMA, labels_in, letters_in, require_prism, rows

from distilbeam.pipelines.config import LabelConfig, load_any_config
from distilbeam.pipelines.streaming.job import StreamJob
from distilbeam.pipelines.streaming.settings import StreamSettings

AT_MS = int(time.time() * 1000) - 1_000


class Header(NamedTuple):
    key: str
    value: bytes


class Record(NamedTuple):
    """A message as the Java connector gives it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: list[Header]
    timestampTypeId: int  # noqa: N815
    timestampTypeName: str  # noqa: N815


beam.coders.registry.register_coder(Header, RowCoder)
beam.coders.registry.register_coder(Record, RowCoder)


class Records(beam.PTransform):
    """What the service expands to: records."""

    submitted: list[Any] = []  # noqa: RUF012  # what was wanted of it

    def expand(self, start: Any) -> Any:
        values = [*(json.dumps(row).encode() for row in rows(20)), None, b"{"]
        headers = [Header("lang", b"en")]
        records = [
            Record("examples", i % 2, i // 2, AT_MS + i, f"k{i}".encode(), value, headers, 0, "CreateTime")
            for i, value in enumerate(values)
        ]
        return start | beam.Create(records, reshuffle=False).with_output_types(Record)

    @classmethod
    def wanted(cls, _: Any, data: bytes, __: Any) -> Records:
        payload = external_transforms_pb2.ExternalConfigurationPayload.FromString(data)
        cls.submitted.append(RowCoder(payload.schema).decode(payload.payload))
        return cls()


beam.PTransform.register_urn(ReadFromKafka.URN_WITH_METADATA, None, Records.wanted)


@pytest.fixture
def service() -> Iterator[str]:
    address, workers = BeamFnExternalWorkerPoolServicer.start()
    servicer = ExpansionServiceServicer(loopback_address=address)
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        beam_expansion_api_pb2_grpc.add_ExpansionServiceServicer_to_server(servicer, server)
        beam_artifact_api_pb2_grpc.add_ArtifactRetrievalServiceServicer_to_server(servicer.artifact_service(), server)
        port = server.add_secure_port("127.0.0.1:0", grpc.local_server_credentials())
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()
    workers.stop(None).wait()


def job(folder: Path, service: str) -> StreamJob:
    model = {"model": "logging_teacher:LoggingTeacher", "arguments": {"log": str(folder / "asked.log")}}
    data = {"pool": "unused", "id": "key", "carry": ["x", "lang"], "num_classes": 3}
    path = folder / "job.toml"
    path.write_text(tomli_w.dumps({"data": data, "teacher": {"kind": "torch", **model, "input": {"columns": ["x"]}}}))
    config = load_any_config(path)
    assert isinstance(config, LabelConfig)
    settings = StreamSettings(
        source="kafka-java:one:9092,two:9092:examples",
        out=str(folder / "labels"),
        schema=f"{SCHEMA},lang:string=header.lang",
        consumer=("sasl.mechanism=PLAIN",),
    )
    services = json.dumps({"sdks:java:io:expansion-service:shadowJar": service})
    return StreamJob(config, settings, (f"--beam_services={services}",))


@pytest.mark.slow
def test_the_connector_is_asked_for_whole_messages_and_each_has_its_place(
    tmp_path: Path, service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRISM", str(require_prism()))
    Records.submitted.clear()
    state = job(tmp_path, service).run()
    (wanted,) = Records.submitted
    assert wanted.topics == ["examples"]
    assert wanted.consumer_config == {
        "bootstrap.servers": "one:9092,two:9092",
        "isolation.level": "read_committed",
        "sasl.mechanism": "PLAIN",
    }
    assert wanted.max_num_records is None
    assert (state.labels, state.dead) == (20, {"message": 2})
    table = labels_in(tmp_path / "labels").sort_by("source_offset")
    places = zip(table["source_partition"].to_pylist(), table["source_offset"].to_pylist(), strict=True)
    assert sorted(places) == [(i, j) for i in range(2) for j in range(10)]
    assert sorted(table["example_id"].to_pylist()) == sorted(row["key"] for row in rows(20))
    assert set(table["lang"].to_pylist()) == {"en"}
    letters = letters_in(tmp_path / "labels-deadletter")
    assert [(letter["key"], letter["value"], letter["timestamp_ms"]) for letter in letters] == [
        (b"k20", None, AT_MS + 20),
        (b"k21", b"{", AT_MS + 21),
    ]


def test_a_service_that_is_not_there_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRISM", str(require_prism()))
    with pytest.raises(
        ValueError, match=r"--source kafka-java: no expansion service answers at 127.0.0.1:1 .*beam_services"
    ):
        job(tmp_path, "127.0.0.1:1")
