"""The server over a real socket: encryption, health, wrong requests, shutdown; and what messages cost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from served_linear import BATCH, INPUT, Code, Connect, Linear, X, client, serving

from distilbeam.teacher import TeacherUnavailable, load_teacher
from distilbeam.teacher.tfserving.messages import load_messages
from distilbeam.teacher.tfserving.serve import ServeOptions, TeacherServer, serve


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
import resource, sys
import numpy as np, pyarrow as pa, grpc
import distilbeam.inputs.config
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from distilbeam.teacher import load_teacher
teacher = load_teacher({"kind": "tfserving", "address": sys.argv[1], "model": "teacher", "input": {"column": "x"}})
print(teacher.logits(pa.record_batch({"x": [[1.0, 0.0, 0.0, 0.0]]})).tolist())
teacher.close()
print(sorted(m for m in sys.modules if m.split(".")[0] in ("tensorflow", "torch", "apache_beam", "keras")))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024)
"""
    with TeacherServer(torch_config(program), base=tmp_path) as server:
        run = subprocess.run([sys.executable, "-c", code, server.address], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answer, modules, is_small = run.stdout.splitlines()
    np.testing.assert_allclose(eval(answer), Linear.weights[:1], rtol=1e-6)  # noqa: S307  (a list of our own)
    assert modules == "[]"
    assert is_small == "True"


def test_messages_cost_little() -> None:
    """Loading them the plain way imports TensorFlow: thousands of modules and hundreds of megabytes."""
    code = """
import resource, sys
from distilbeam.teacher.tfserving import messages
before, modules = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, len(sys.modules)
messages.load_messages().predict.PredictRequest()
print(len(sys.modules) - modules, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, kilobytes = map(int, run.stdout.split())
    assert modules < 100
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
