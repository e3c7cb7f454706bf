"""Serving a model: one machine that has a teacher answers many workers that do not; a student answers its users.

`ModelServer` puts anything that answers as a teacher does behind TensorFlow Serving's PredictionService and ModelService and
the standard gRPC health service, `TeacherServer` any teacher of a configuration; the same client asks this server, TensorFlow
Serving, or anything else that speaks the protocol.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2

from distilbeam.inputs.config import InputConfig
from distilbeam.teacher.config import TeacherConfig, parse_teacher_config
from distilbeam.teacher.load import load_teacher
from distilbeam.teacher.protocol import Teacher
from distilbeam.teacher.tfserving.channels import read_secret
from distilbeam.teacher.tfserving.receiving import Code, Limits, Refused
from distilbeam.teacher.tfserving.serve_options import ServeOptions
from distilbeam.teacher.tfserving.service import ModelService

_log = logging.getLogger(__name__)


# Half-open and idle connections are closed, a machine that is gone is noticed, and no client takes all streams.
_CONNECTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.max_allowed_incoming_connections", 512),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)
_RECEIVERS = 88  # threads besides those that answer, for requests that arrive slowly or never


class ModelServer:
    """A running server; as a context manager it stops at the end of the block.

    Args:
      model: what is served; the server closes it.
      inputs: what it reads.
      port: port to listen on; 0 for any free one.
      options: how it is served.
      classes: names of its classes in the order of the logits, to answer with the class of each row too.

    Attributes:
      port: the port.
      version: version of the model.
      fingerprint: fingerprint of the model.

    Raises:
      ValueError: the model cannot be served, or the port is taken.
    """

    def __init__(
        self,
        model: Teacher,
        inputs: InputConfig,
        port: int = 0,
        options: ServeOptions | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.options = options = options or ServeOptions()
        self._teacher = model
        self.fingerprint = model.fingerprint()
        self.version = _version(self.fingerprint) if options.version is None else options.version
        limits = Limits(options.max_rows, options.receive_s, 8 * options.max_message_bytes, options.threads)
        service = ModelService(model, inputs, options.name, self.version, options.top_k, limits, classes)
        self._serving = threading.Event()
        self._threads = ThreadPoolExecutor(options.threads + _RECEIVERS, thread_name_prefix="serve-model")
        self._server = self._started(service, port)
        self.port: int = self._port

    @property
    def address(self) -> str:
        """Where clients find it, `host:port`."""
        return _address(self.options.host, self.port)

    def stop(self) -> None:
        """Refuse new requests, let those in progress end, and close the model; a second call does nothing."""
        self._serving.clear()
        self._server.stop(self.options.grace_s).wait()
        self._threads.shutdown()
        self._teacher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _started(self, service: ModelService, port: int) -> grpc.Server:
        limit = self.options.max_message_bytes
        options = [
            ("grpc.max_receive_message_length", limit),
            ("grpc.max_send_message_length", limit),
            *_CONNECTIONS,
        ]
        together = self.options.threads + self.options.max_queued
        server = grpc.server(self._threads, options=options, maximum_concurrent_rpcs=together)
        check = service.gate.handler(self._check, health_pb2.HealthCheckRequest, at_once=True)
        health = grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})
        server.add_generic_rpc_handlers([*service.handlers(), health])
        address = _address(self.options.host, port)
        credentials = _credentials(self.options)
        try:
            self._port = (
                server.add_insecure_port(address)
                if credentials is None
                else server.add_secure_port(address, credentials)
            )
        except RuntimeError as e:
            self._teacher.close()
            raise ValueError(
                f"port {port} of {self.options.host} cannot be listened on; choose another port or host"
            ) from e
        server.start()
        self._serving.set()
        return server

    def _check(self, request: Any) -> Any:
        """Answer Health.Check; Health.Watch, whose answers have no end, is not served."""
        if request.service not in _SERVICES:
            raise Refused(Code.NOT_FOUND, f"service '{request.service}' is not served here")
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if self._serving.is_set() else states.NOT_SERVING)


class TeacherServer(ModelServer):
    """A running server of a teacher; see `ModelServer`.

    Args:
      config: the teacher.
      port: port to listen on; 0 for any free one.
      options: how it is served.
      base: folder that the teacher's relative paths start at.

    Raises:
      ValueError: the teacher cannot be loaded or served, or the port is taken.
    """

    def __init__(
        self,
        config: TeacherConfig | Mapping[str, Any],
        port: int = 0,
        options: ServeOptions | None = None,
        *,
        base: str | Path | None = None,
    ) -> None:
        parsed = parse_teacher_config(dict(config)) if isinstance(config, Mapping) else config
        super().__init__(load_teacher(parsed, base=base), parsed.input, port, options)


_SERVICES = ("", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService")


def serve(
    config: TeacherConfig | Mapping[str, Any],
    port: int = 8500,
    options: ServeOptions | None = None,
    *,
    base: str | Path | None = None,
    ready: Callable[[ModelServer], None] | None = None,
) -> None:
    """Serve a teacher until the process gets SIGINT or SIGTERM.

    Args:
      config: the teacher.
      port: port to listen on; 0 for any free one.
      options: how it is served.
      base: folder that the teacher's relative paths start at.
      ready: called once with the running server.

    Raises:
      ValueError: the teacher cannot be loaded or served, or the port is taken.
    """
    serve_until_stopped(lambda: TeacherServer(config, port, options, base=base), ready)


def serve_until_stopped(
    open_server: Callable[[], ModelServer], ready: Callable[[ModelServer], None] | None = None
) -> None:
    """Serve a model until the process gets SIGINT or SIGTERM.

    Args:
      open_server: loads the model and begins to serve it.
      ready: called once with the running server.
    """
    with _signals() as stopping, open_server() as server:
        _log.info("%s is served at %s as '%s'", server.fingerprint, server.address, server.options.name)
        if ready is not None:
            ready(server)
        while not stopping.wait(1.0):  # short waits, so that signals are seen
            pass


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Turn the signals that ask a process to end into an event, and give the former handlers back."""
    stopping = threading.Event()
    former = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _address(host: str, port: int) -> str:
    if host.startswith("unix:"):
        return host
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _version(fingerprint: str) -> int:
    return int.from_bytes(hashlib.blake2b(fingerprint.encode(), digest_size=6).digest(), "big")


def _credentials(options: ServeOptions) -> grpc.ServerCredentials | None:
    certificate, key = read_secret(options.cert_file, "cert_file"), read_secret(options.key_file, "key_file")
    if certificate is None or key is None:
        return None
    authority = read_secret(options.client_ca_file, "client_ca_file")
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=authority is not None)
