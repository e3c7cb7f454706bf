"""Client and server over a real socket: values, metadata, retries, encryption, headers, limits, shutdown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from scipy.special import log_softmax

from distilbeam.teacher import TeacherChanged, TeacherUnavailable, ask, load_teacher
from distilbeam.teacher.config import TfServingConfig
from distilbeam.teacher.preprocess import InputConfig, make_input
from distilbeam.teacher.serving import ServeOptions, TeacherServer, serve
from distilbeam.teacher.softlabels import SoftLabelSpec, encode
from distilbeam.teacher.tfserving.calling import Servers
from distilbeam.teacher.tfserving.messages import load_messages
from distilbeam.teacher.tfserving.service import ModelService

Code = grpc.StatusCode
CLASSES = 7
X = np.random.default_rng(3).normal(size=(40, 4)).astype(np.float32)
BATCH = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 4)})
INPUT = {"column": "x", "shape": [4]}


class Linear:
    """A teacher of known weights; rows whose first number is above `poison` raise."""

    weights = np.random.default_rng(4).normal(size=(4, CLASSES)).astype(np.float32)

    def __init__(self, poison: float = np.inf) -> None:
        self.poison = poison
        self.rows: list[int] = []
        self.closed = False
        self.wait = threading.Event()
        self.wait.set()

    def fingerprint(self) -> str:
        return "linear"

    def logits(self, batch: pa.RecordBatch) -> np.ndarray:
        self.wait.wait(30)
        x = make_input(InputConfig.model_validate(INPUT))(batch)
        self.rows.append(len(x))
        if (x[:, 0] > self.poison).any():
            raise RuntimeError("poisoned")
        answer: np.ndarray = x @ self.weights
        return answer

    def close(self) -> None:
        self.closed = True


class Script(grpc.ServerInterceptor):
    """Fails the next requests to Predict with the given codes, and keeps the headers of all."""

    def __init__(self) -> None:
        self.codes: list[tuple[grpc.StatusCode, str]] = []
        self.headers: list[dict[str, Any]] = []
        self.predictions = 0

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        self.headers.append(dict(details.invocation_metadata))
        if not details.method.endswith("/Predict"):
            return continuation(details)
        self.predictions += 1
        if not self.codes:
            return continuation(details)
        code, text = self.codes.pop(0)
        return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(code, text))


@contextmanager
def serving(teacher: Any, script: Script | None = None, version: int = 5, top_k: int | None = None) -> Iterator[str]:
    """Serve a teacher object at a free port."""
    service = ModelService(teacher, InputConfig.model_validate(INPUT), "teacher", version, top_k)
    with ThreadPoolExecutor(8) as threads:
        server = grpc.server(threads, interceptors=[script] if script else [], options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers(service.handlers())
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(None).wait()


def client(*addresses: str, **settings: Any) -> Any:
    quick = {"first_wait_s": 0.001, "longest_wait_s": 0.01, "timeout_s": 10.0, "model": "teacher", "input": INPUT}
    return load_teacher({"kind": "tfserving", "addresses": list(addresses), **quick, **settings})


@pytest.fixture
def connect() -> Iterator[Callable[..., Any]]:
    """Make clients that are closed at the end."""
    made: list[Any] = []

    def make(*addresses: str, **settings: Any) -> Any:
        made.append(client(*addresses, **settings))
        return made[-1]

    yield make
    for teacher in made:
        teacher.close()


Connect = Callable[..., Any]


def test_answers_are_those_of_the_model(connect: Connect) -> None:
    with serving(Linear()) as address:
        remote = connect(address)
        np.testing.assert_array_equal(remote.logits(BATCH), X @ Linear.weights)
        assert remote.logits(BATCH).dtype == np.float32
        assert remote.logits(BATCH.slice(0, 0)).shape == (0, CLASSES)
        np.testing.assert_allclose(remote.logits(BATCH.slice(5, 3)), X[5:8] @ Linear.weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"batch_rows": 16}, [16, 16, 8]),
        ({"batch_bytes": 12 * 16 + 15}, [12, 12, 12, 4]),
        ({"batch_bytes": 1}, [1] * 40),
    ],
)
def test_batches_are_cut_by_rows_and_bytes(connect: Connect, settings: dict[str, Any], rows: list[int]) -> None:
    teacher = Linear()
    with serving(teacher) as address:
        remote = connect(address, **settings)
        teacher.rows.clear()
        np.testing.assert_allclose(remote.logits(BATCH), X @ Linear.weights, rtol=1e-5, atol=1e-6)
        assert sorted(teacher.rows, reverse=True) == rows


def test_no_more_requests_are_in_flight_than_allowed(connect: Connect) -> None:
    class Counting(Script):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.most = 0
            self.lock = threading.Lock()

        def intercept_service(self, continuation: Any, details: Any) -> Any:
            handler = super().intercept_service(continuation, details)

            def counted(request: Any, context: Any) -> Any:
                with self.lock:
                    self.now += 1
                    self.most = max(self.most, self.now)
                time.sleep(0.02)
                with self.lock:
                    self.now -= 1
                return handler.unary_unary(request, context)

            return grpc.unary_unary_rpc_method_handler(
                counted, handler.request_deserializer, handler.response_serializer
            )

    counting = Counting()
    with serving(Linear(), counting) as address:
        connect(address, batch_rows=2, parallel=3).logits(BATCH)
    assert counting.most == 3


def test_the_server_s_top_k_gives_the_same_labels(connect: Connect) -> None:
    with serving(Linear(), top_k=3) as address:
        remote = connect(address).logits(BATCH)
    local = X @ Linear.weights
    assert remote.shape == local.shape
    spec = SoftLabelSpec(CLASSES, "top_k", 3)
    for name in ("teacher_logprobs", "teacher_classes", "teacher_margin"):
        there, here = encode(remote, spec)[name], encode(local, spec)[name]
        np.testing.assert_allclose(np.array(there.to_pylist()), np.array(here.to_pylist()), atol=2e-3)
    exact = log_softmax(local.astype(np.float64), axis=1)
    order = np.argsort(-local, axis=1)
    np.testing.assert_allclose(
        np.take_along_axis(remote, order[:, :3], 1), np.take_along_axis(exact, order[:, :3], 1), atol=1e-5
    )
    np.testing.assert_allclose(np.exp(remote.astype(np.float64)).sum(axis=1), 1, rtol=1e-5)


def test_bad_rows_are_found_through_the_server(connect: Connect) -> None:
    bad = set(np.flatnonzero(X[:, 0] > 1.5).tolist())
    assert 1 <= len(bad) <= 5
    for top_k in (None, 2):
        with serving(Linear(poison=1.5), top_k=top_k) as address:
            x = X.copy()
            x[3, 2] = np.nan
            rows = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 4)})
            remote = connect(address, probe_tolerance=1.0)
            answers = ask(remote, rows, CLASSES, batch_size=8)
        assert {e.row for e in answers.errors} == bad | {3}
        assert {e.error for e in answers.errors if e.row in bad} == {
            f"RequestRefused: {address}: INTERNAL: RuntimeError: poisoned"
        }
        assert next(e.stage for e in answers.errors if e.row == 3) == "answer"


@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.ABORTED])
def test_what_can_pass_is_tried_again(connect: Connect, code: grpc.StatusCode) -> None:
    script = Script()
    with serving(Linear(), script) as address:
        remote = connect(address, attempts=4)
        script.codes, script.predictions = [(code, "later")] * 3, 0
        np.testing.assert_array_equal(remote.logits(BATCH), X @ Linear.weights)
        assert script.predictions == 4


def test_attempts_end(connect: Connect) -> None:
    script = Script()
    with serving(Linear(), script) as address:
        remote = connect(address, attempts=3)
        script.codes, script.predictions = [(Code.UNAVAILABLE, "down")] * 99, 0
        message = (
            rf"did not answer in 3 attempts \({address}: UNAVAILABLE: down\); start the server or raise teacher.att"
        )
        with pytest.raises(TeacherUnavailable, match=message):
            remote.logits(BATCH)
        assert script.predictions == 3


@pytest.mark.parametrize(
    "code", [Code.INVALID_ARGUMENT, Code.INTERNAL, Code.UNKNOWN, Code.FAILED_PRECONDITION, Code.DATA_LOSS]
)
def test_what_cannot_pass_is_not_tried_again_and_is_the_rows_fault(connect: Connect, code: grpc.StatusCode) -> None:
    script = Script()
    with serving(Linear(), script) as address:
        remote = connect(address)
        script.codes, script.predictions = [(code, "no")], 0
        answers = ask(remote, BATCH.slice(0, 1), CLASSES)
        assert [(e.row, e.error) for e in answers.errors] == [(0, f"RequestRefused: {address}: {code.name}: no")]
        assert script.predictions == 1


@pytest.mark.parametrize("code", [Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.NOT_FOUND, Code.UNIMPLEMENTED])
def test_what_no_row_can_help_stops_the_job_at_once(connect: Connect, code: grpc.StatusCode) -> None:
    script = Script()
    with serving(Linear(), script) as address:
        remote = connect(address)
        script.codes, script.predictions = [(code, "no")], 0
        with pytest.raises(
            TeacherUnavailable, match=rf"refuses every request \({address}: {code.name}: no\); check address"
        ):
            ask(remote, BATCH, CLASSES)
        assert script.predictions == 1


def test_waits_double_up_to_the_longest_and_are_jittered() -> None:
    bounds: list[tuple[float, float]] = []
    slept: list[float] = []

    def jitter(low: float, high: float) -> float:
        bounds.append((low, high))
        return high / 2

    config = TfServingConfig(
        addresses=("127.0.0.1:1",),
        model="m",
        input=InputConfig(columns=("x",)),
        attempts=6,
        first_wait_s=0.5,
        longest_wait_s=3,
    )
    servers = Servers(config, slept.append, jitter)
    messages = load_messages()
    with pytest.raises(TeacherUnavailable, match="did not answer in 6 attempts"):
        servers.call("/a.B/C", messages.predict.PredictRequest(), messages.predict.PredictResponse)
    servers.close()
    assert bounds == [(0, 0.5), (0, 1.0), (0, 2.0), (0, 3), (0, 3)]
    assert slept == [0.25, 0.5, 1.0, 1.5, 1.5]


def test_a_server_that_hangs_meets_the_deadline(connect: Connect) -> None:
    teacher = Linear()
    with serving(teacher) as address:
        remote = connect(address, timeout_s=0.3, attempts=2)
        teacher.wait.clear()
        start = time.monotonic()
        with pytest.raises(TeacherUnavailable, match="DEADLINE_EXCEEDED"):
            remote.logits(BATCH)
        assert 0.6 <= time.monotonic() - start < 5
        teacher.wait.set()


def test_addresses_are_asked_in_turn_and_a_dead_one_is_passed_over(connect: Connect) -> None:
    one, two = Script(), Script()
    with serving(Linear(), one) as a, serving(Linear(), two) as b:
        remote = connect(a, b, "127.0.0.1:1", batch_rows=4, parallel=1)
        one.predictions = two.predictions = 0
        np.testing.assert_allclose(remote.logits(BATCH), X @ Linear.weights, rtol=1e-5, atol=1e-6)
        assert one.predictions + two.predictions == 10
        assert min(one.predictions, two.predictions) >= 3


def test_no_server_at_all_is_a_sentence() -> None:
    with pytest.raises(TeacherUnavailable, match="the teacher did not answer in 2 attempts"):
        client("127.0.0.1:1", attempts=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"signature": "predict"}, "teacher.signature 'predict' is unknown; model 'teacher' has serving_default"),
        ({"input_name": "y"}, "teacher.input_name 'y' is unknown; model 'teacher' has x"),
        ({"output_name": "scores"}, "teacher.output_name 'scores' is unknown; model 'teacher' has logits"),
    ],
)
def test_wrong_names_are_refused_with_the_right_ones(settings: dict[str, Any], message: str) -> None:
    with serving(Linear()) as address, pytest.raises(ValueError, match=f"^{message}$"):
        client(address, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "other"}, "NOT_FOUND: model 'other' is not served here; there is 'teacher'"),
        ({"version": 4}, "NOT_FOUND: version 4 is not served here; there is 5"),
        ({"version_label": "stable"}, "NOT_FOUND: version label 'stable' is unknown; no labels are served here"),
    ],
)
def test_another_model_or_version_is_not_there(settings: dict[str, Any], message: str) -> None:
    with serving(Linear()) as address, pytest.raises(TeacherUnavailable, match=message):
        client(address, **settings)


def test_the_right_version_may_be_named(connect: Connect) -> None:
    with serving(Linear()) as address:
        assert connect(address, version=5).fingerprint().startswith("tfserving:teacher:5:")


def test_fingerprint_follows_the_answers_and_the_version(connect: Connect) -> None:
    class Other(Linear):
        weights = Linear.weights * 1.5

    class Noisy(Linear):
        def logits(self, batch: pa.RecordBatch) -> np.ndarray:
            answer = super().logits(batch)
            return answer + np.random.default_rng().normal(size=answer.shape).astype(np.float32) * 1e-6

    with (
        serving(Linear()) as a,
        serving(Linear()) as b,
        serving(Other()) as c,
        serving(Linear(), version=6) as d,
        serving(Noisy()) as e,
    ):
        same = connect(a).fingerprint()
        assert same == connect(a).fingerprint() == connect(b).fingerprint() == connect(b, a).fingerprint()
        assert same == connect(e).fingerprint()
        others = [
            connect(c).fingerprint(),
            connect(d).fingerprint(),
            connect(a, input={**INPUT, "scale": 2.0}).fingerprint(),
        ]
    assert len({same, *others}) == 4


def test_another_version_in_the_middle_stops_the_job(connect: Connect) -> None:
    service = ModelService(Linear(), InputConfig.model_validate(INPUT), "teacher", 5, None)
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        server.add_generic_rpc_handlers(service.handlers())
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        remote = connect(address)
        remote.logits(BATCH)
        service._version = 6
        message = (
            "the teacher changed while it was being asked: model 'teacher' was version 5, now 6; set teacher.version"
        )
        with pytest.raises(TeacherChanged, match=message):
            ask(remote, BATCH, CLASSES)
        server.stop(None).wait()


def test_other_answers_under_the_same_version_are_noticed(connect: Connect) -> None:
    teacher = Linear()
    with serving(teacher) as address:
        remote = connect(address)
        remote.fingerprint()
        teacher.weights = teacher.weights * 1.5
        with pytest.raises(
            TeacherChanged, match=r"answers the same questions differently by more than 0.001; put the former"
        ):
            remote.fingerprint()


def test_headers_come_from_environment_and_files(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script()
    token = tmp_path / "token"
    token.write_text("first\n")
    monkeypatch.setenv("TEACHER_KEY", "secret-of-the-environment")
    headers = {"authorization": {"file": str(token), "prefix": "Bearer "}, "x-api-key": {"env": "TEACHER_KEY"}}
    with serving(Linear(), script) as address:
        remote = connect(address, headers=headers)
        remote.logits(BATCH)
        assert script.headers[-1]["authorization"] == "Bearer first"
        assert script.headers[-1]["x-api-key"] == "secret-of-the-environment"
        token.write_text("renewed")
        remote.logits(BATCH)
        assert script.headers[-1]["authorization"] == "Bearer renewed"
        monkeypatch.delenv("TEACHER_KEY")
        with pytest.raises(
            ValueError, match=r"teacher.headers.x-api-key.env: the environment has no TEACHER_KEY; set it"
        ):
            remote.logits(BATCH)
        script.codes = []
    config = TfServingConfig(addresses=("a:1",), model="m", input=InputConfig(columns=("x",)), headers=headers)  # type: ignore[arg-type]
    assert "secret" not in config.model_dump_json()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"headers": {"a": {"env": "A", "file": "b"}}}, "a header must have either env or file"),
        ({"headers": {"a": "Bearer 123"}}, "valid dictionary"),
        ({"cert_file": "c", "tls": True}, "cert_file and key_file must be given together"),
        ({"ca_file": "c"}, "ca_file, cert_file, key_file and server_name need tls = true"),
        ({"version": 1, "version_label": "stable"}, "version and version_label must not both be given"),
        ({"address": "a:1"}, "address and addresses must not both be given"),
        (
            {"tls": True, "ca_file": "no.pem"},
            r"teacher.ca_file: no.pem cannot be read \(No such file or directory\); check",
        ),
    ],
)
def test_wrong_settings_are_sentences(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client("127.0.0.1:1", **settings)


def test_message_limits_split_the_batch_instead_of_failing(connect: Connect) -> None:
    with serving(Linear()) as address:
        remote = connect(address, max_message_bytes=1024, batch_rows=40)
        answers = ask(remote, BATCH, CLASSES, batch_size=40)
        np.testing.assert_allclose(answers.logits, X @ Linear.weights, rtol=1e-5, atol=1e-6)
        assert answers.requests > 1


def test_large_messages_pass_the_default_limit_of_grpc(connect: Connect) -> None:
    wide = np.ones((6, 4), np.float32)

    class Wide(Linear):
        weights = np.random.default_rng(0).normal(size=(4, 300_000)).astype(np.float32)

    with serving(Wide()) as address:
        server_limit_free = connect(address, batch_rows=6)
        rows = pa.record_batch({"x": pa.FixedSizeListArray.from_arrays(pa.array(wide.ravel()), 4)})
        assert server_limit_free.logits(rows).nbytes == 6 * 300_000 * 4 > 4 * 2**20


def certificates(folder: Path) -> None:
    """Write a certificate authority and certificates of a server and a client that it signed."""
    x509 = pytest.importorskip("cryptography.x509", reason="cryptography is not installed")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name(text: str) -> Any:
        return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text)])

    def write(who: str, key: Any, issuer: str, issuer_key: Any, authority: bool) -> None:
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name(who))
            .issuer_name(name(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("teacher.test")]), critical=False)
            .sign(issuer_key, hashes.SHA256())
        )
        (folder / f"{who}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / f"{who}.key").write_bytes(key.private_bytes(*form))

    keys = {who: ec.generate_private_key(ec.SECP256R1()) for who in ("ca", "server", "client")}
    write("ca", keys["ca"], "ca", keys["ca"], authority=True)
    for who in ("server", "client"):
        write(who, keys[who], "ca", keys["ca"], authority=False)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """An exported torch program with a Linear's weights."""
    layer = torch.nn.Linear(4, CLASSES, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(Linear.weights.T))
    shapes = ({0: torch.export.Dim("rows")},)
    torch.export.save(torch.export.export(layer, (torch.zeros(2, 4),), dynamic_shapes=shapes), tmp_path / "net.pt2")
    return tmp_path / "net.pt2"


def torch_config(program: Path) -> dict[str, Any]:
    return {"kind": "torch", "model": program.name, "input": INPUT, "device": "cpu"}


@pytest.mark.parametrize("mutual", [False, True])
def test_encryption(connect: Connect, program: Path, tmp_path: Path, mutual: bool) -> None:
    certificates(tmp_path)
    paths = {name: str(tmp_path / name) for name in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")}
    options = ServeOptions(
        cert_file=paths["server.pem"], key_file=paths["server.key"], client_ca_file=paths["ca.pem"] if mutual else None
    )
    trust = {"tls": True, "ca_file": paths["ca.pem"], "server_name": "teacher.test", "attempts": 1}
    own = {"cert_file": paths["client.pem"], "key_file": paths["client.key"]}
    with TeacherServer(torch_config(program), options=options, base=tmp_path) as server:
        remote = connect(server.address, **trust, **(own if mutual else {}))
        np.testing.assert_allclose(remote.logits(BATCH), X @ Linear.weights, rtol=1e-5, atol=1e-6)
        refused: list[dict[str, Any]] = [{"attempts": 1}, {**trust, "server_name": "elsewhere.test"}]
        refused += [trust] if mutual else []
        for settings in refused:
            with pytest.raises(TeacherUnavailable, match="UNAVAILABLE"):
                client(server.address, **settings)


def test_a_served_torch_teacher_equals_the_one_in_process(connect: Connect, program: Path, tmp_path: Path) -> None:
    local: Any = load_teacher(torch_config(program), base=tmp_path)
    with TeacherServer(torch_config(program), base=tmp_path) as server:
        remote = connect(server.address, batch_rows=16)
        assert server.fingerprint == local.fingerprint()
        np.testing.assert_allclose(remote.logits(BATCH), local.logits(BATCH), rtol=1e-6, atol=1e-6)
        first = server.version
    torch.export.save(torch.export.load(program), tmp_path / "net.pt2", extra_files={"note": "another file"})
    with TeacherServer(torch_config(program), base=tmp_path) as server:
        assert server.version != first


def test_health_and_model_status(program: Path, tmp_path: Path) -> None:
    messages = load_messages()
    server = TeacherServer(torch_config(program), base=tmp_path, options=ServeOptions(name="digits", version=3))
    with grpc.insecure_channel(server.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for service in ("", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService"):
            assert (
                check(health_pb2.HealthCheckRequest(service=service)).status == health_pb2.HealthCheckResponse.SERVING
            )
        status = channel.unary_unary(
            "/tensorflow.serving.ModelService/GetModelStatus",
            request_serializer=messages.status.GetModelStatusRequest.SerializeToString,
            response_deserializer=messages.status.GetModelStatusResponse.FromString,
        )
        request = messages.status.GetModelStatusRequest()
        request.model_spec.name = "digits"
        answer = status(request).model_version_status
        assert [(s.version, messages.status.ModelVersionStatus.State.Name(s.state)) for s in answer] == [
            (3, "AVAILABLE")
        ]
        request.model_spec.name = "letters"
        with pytest.raises(grpc.RpcError) as caught:
            status(request)
        assert caught.value.code() is Code.NOT_FOUND
    server.stop()
    server.stop()


def test_a_request_in_progress_ends_before_the_server_does(connect: Connect, program: Path, tmp_path: Path) -> None:
    server = TeacherServer(torch_config(program), base=tmp_path)
    remote = connect(server.address)
    entered, release = threading.Event(), threading.Event()
    model = server._teacher.logits

    def slow(batch: pa.RecordBatch) -> np.ndarray:
        entered.set()
        release.wait(20)
        return model(batch)

    server._teacher.logits = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as threads:
        answer = threads.submit(remote.logits, BATCH)
        assert entered.wait(10)
        stopping = threads.submit(server.stop)
        time.sleep(0.2)
        assert not stopping.done()
        release.set()
        np.testing.assert_allclose(answer.result(20), X @ Linear.weights, rtol=1e-5, atol=1e-6)
        stopping.result(20)
    with pytest.raises(RuntimeError, match="the teacher was closed"):
        model(BATCH)


def test_a_taken_port_is_a_sentence(program: Path, tmp_path: Path) -> None:
    with (
        TeacherServer(torch_config(program), base=tmp_path) as server,
        pytest.raises(ValueError, match=f"port {server.port} of 127.0.0.1 cannot be listened on; choose another port"),
    ):
        TeacherServer(torch_config(program), server.port, base=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cert_file": "a"}, "cert_file and key_file must be given together"),
        ({"client_ca_file": "a"}, "client_ca_file needs cert_file and key_file"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
    ],
)
def test_wrong_serving_options_are_sentences(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        ServeOptions(**options)


def test_serve_ends_on_a_signal_and_gives_the_handlers_back(program: Path, tmp_path: Path) -> None:
    seen: list[TeacherServer] = []

    def ready(server: TeacherServer) -> None:
        seen.append(server)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    before = signal.getsignal(signal.SIGTERM)
    serve(torch_config(program), 0, base=tmp_path, ready=ready)
    assert len(seen) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def call(address: str, change: Callable[[Any], None]) -> grpc.RpcError:
    messages = load_messages()
    request = messages.predict.PredictRequest()
    request.model_spec.name = "teacher"
    change(request)
    with grpc.insecure_channel(address) as channel:
        predict = channel.unary_unary(
            "/tensorflow.serving.PredictionService/Predict",
            request_serializer=messages.predict.PredictRequest.SerializeToString,
            response_deserializer=messages.predict.PredictResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            predict(request, timeout=10)
    return caught.value


def with_input(request: Any, array: np.ndarray, name: str = "x") -> Any:
    from distilbeam.teacher.tfserving.tensors import to_proto

    request.inputs[name].CopyFrom(to_proto(array))
    return request


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: None, "the inputs must be x, got none"),
        (lambda r: with_input(r, X, "y"), "the inputs must be x, got y"),
        (lambda r: with_input(r, np.float32(1)), "input x must have one row per example, got a single value"),
        (lambda r: with_input(r, X[:, :3]), "an example of shape [4] has 4 numbers, column x holds 3"),
        (
            lambda r: setattr(with_input(r, X).inputs["x"], "tensor_content", b"1234"),
            "a tensor of shape [40, 4] must have 160 values, got 1",
        ),
        (lambda r: with_input(r, X).output_filter.append("scores"), "output 'scores' is unknown; there are logits"),
        (
            lambda r: setattr(r.model_spec, "signature_name", "other"),
            "the model has the signature serving_default only",
        ),
    ],
)
def test_the_server_refuses_wrong_requests_in_sentences(change: Callable[[Any], None], message: str) -> None:
    with serving(Linear()) as address:
        error = call(address, change)
    assert (error.code(), error.details()) == (Code.INVALID_ARGUMENT, message)


def test_a_client_does_not_load_tensorflow_nor_torch(program: Path, tmp_path: Path) -> None:
    code = """
import resource, sys, time
import numpy as np, pyarrow as pa, grpc
import distilbeam.teacher.preprocess
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
from distilbeam.teacher import load_teacher
teacher = load_teacher({"kind": "tfserving", "address": sys.argv[1], "model": "teacher", "input": {"column": "x"}})
print(teacher.logits(pa.record_batch({"x": [[1.0, 0.0, 0.0, 0.0]]})).tolist())
teacher.close()
print(sorted(m for m in sys.modules if m.split(".")[0] in ("tensorflow", "torch", "apache_beam", "keras")))
print(time.perf_counter() - start < 2, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024)
"""
    with TeacherServer(torch_config(program), base=tmp_path) as server:
        run = subprocess.run([sys.executable, "-c", code, server.address], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answer, modules, bounds = run.stdout.splitlines()
    np.testing.assert_allclose(eval(answer), Linear.weights[:1], rtol=1e-6)  # noqa: S307  (a list of our own)
    assert modules == "[]"
    assert bounds == "True True"


def test_messages_cost_little() -> None:
    """Loading them the plain way costs seconds and hundreds of megabytes; these bounds leave room for a busy machine."""
    code = """
import resource, time
from distilbeam.teacher.tfserving import messages
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
messages.load_messages().predict.PredictRequest()
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, run.stdout.split())
    assert seconds < 0.5
    assert kilobytes < 32 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_tensorflow_still_works_beside_the_messages(first: str) -> None:
    code = """
import sys
from distilbeam.teacher.tfserving.messages import load_messages
if sys.argv[1] == "ours":
    messages = load_messages()
    assert not [m for m in sys.modules if m == "tensorflow" or m.startswith("tensorflow.")]
import tensorflow as tf
messages = load_messages()
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
from tensorflow.core.framework import tensor_pb2
assert predict_pb2.PredictRequest is messages.predict.PredictRequest
assert tensor_pb2.TensorProto is messages.tensor
request = messages.predict.PredictRequest()
request.inputs["x"].CopyFrom(tf.make_tensor_proto([[1.5, 2.5]]))
print(tf.make_ndarray(request.inputs["x"]).tolist(), (tf.constant([1, 2]) + 1).numpy().tolist(), tf.__file__.endswith("__init__.py"))
"""
    run = subprocess.run([sys.executable, "-c", code, first], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[[1.5, 2.5]] [2, 3] True\n"


def test_models_of_several_inputs_get_all_of_them(
    connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of two inputs, asked through an input function that returns both."""

    class Sum:
        def fingerprint(self) -> str:
            return "sum"

        def logits(self, batch: pa.RecordBatch) -> np.ndarray:
            a, b = (make_input(InputConfig(columns=(name,)))(batch) for name in ("a", "b"))
            return np.concatenate([a + b, a - b], axis=1)

        def close(self) -> None:
            pass

    (tmp_path / "two_inputs.py").write_text(
        "import numpy as np\n"
        "def both(batch):\n"
        "    x = np.array(batch['x'].to_pylist(), np.float32)\n"
        "    return {'a': x[:, :1], 'b': x[:, 1:2]}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    service = ModelService(Sum(), InputConfig(columns=("a", "b")), "teacher", 1, None)
    with ThreadPoolExecutor(4) as threads:
        server = grpc.server(threads)
        server.add_generic_rpc_handlers(service.handlers())
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        function = {"kind": "function", "column": "x", "function": "two_inputs:both"}
        remote = connect(address, input=function, probe_shape=(1,), batch_rows=16)
        expected = np.stack([X[:, 0] + X[:, 1], X[:, 0] - X[:, 1]], axis=1)
        np.testing.assert_array_equal(remote.logits(BATCH), expected)
        single = connect(address, input=INPUT, probe_shape=(1,))
        with pytest.raises(
            ValueError, match="the model has the inputs a, b, got one array; several inputs need an input of kind"
        ):
            single.logits(BATCH)
        server.stop(None).wait()
