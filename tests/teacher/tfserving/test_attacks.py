"""A served teacher among clients that mean it no good, and a client of a server that does: bounded, answered, quiet."""

from __future__ import annotations

import gzip
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
from served_linear import BATCH, CLASSES, INPUT, Code, Connect, Linear, X, client, serving

from distilbeam.teacher import TeacherChanged, ask
from distilbeam.teacher.tfserving.calling import RequestRefused
from distilbeam.teacher.tfserving.channels import request_headers
from distilbeam.teacher.tfserving.messages import load_messages
from distilbeam.teacher.tfserving.receiving import Limits
from distilbeam.teacher.tfserving.serve import ServeOptions, TeacherServer
from distilbeam.teacher.tfserving.tensors import to_array, to_proto

PREDICT = "/tensorflow.serving.PredictionService/Predict"
MB = 2**20


def tensor(shape: tuple[int, ...], dtype: int = 1, **values: Any) -> Any:
    proto = load_messages().tensor(dtype=dtype, **values)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    return proto


def request(proto: Any) -> bytes:
    message = load_messages().predict.PredictRequest()
    message.model_spec.name = "teacher"
    message.inputs["x"].CopyFrom(proto)
    data: bytes = message.SerializeToString()
    return data


GOOD = request(tensor((1, 4), float_val=[1, 2, 3, 4]))


def status(address: str, data: bytes, timeout: float = 30, **options: Any) -> tuple[grpc.StatusCode, str]:
    """Send bytes to Predict over a connection of their own."""
    settings = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, settings) as channel:
        try:
            channel.unary_unary(PREDICT)(data, timeout=timeout, **options)
        except grpc.RpcError as e:
            return e.code(), e.details()
    return Code.OK, ""


class Served:
    """`serve-teacher` as a process of its own, so that its memory is its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        (folder / "teacher.toml").write_text(
            '[teacher]\nkind = "torch"\nmodel = "net.pt2"\ndevice = "cpu"\ninput = { columns = ["x"] }\n'
        )
        command = [sys.executable, "-m", "distilbeam", "serve-teacher", str(folder / "teacher.toml"), "--port", "0"]
        self.errors = folder / "stderr"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [*command, *options],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "COLUMNS": "200"},
            )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().partition(" at ")[2].split(" ")[0]

    @property
    def most_bytes(self) -> int:
        """The most memory that the process has had."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

    def interrupt(self) -> tuple[int, str]:
        """Send Ctrl-C and return the exit status and what stands on standard error."""
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=60)
        return self.process.returncode, self.errors.read_text()


@pytest.fixture
def served(program: Path, tmp_path: Path) -> Iterator[Served]:
    del program
    running = Served(tmp_path)
    yield running
    running.process.kill()
    running.process.communicate()


BAD: list[tuple[str, Callable[[], Any], str]] = [
    ("rows", lambda: tensor((2**29, 4), float_val=[1]), "at most 16,384 rows here, got 536,870,912"),
    ("product beyond 64 bits", lambda: tensor((16, 2**62), float_val=[1]), "sizes must be from 0 to"),
    ("no row, wide", lambda: tensor((0, 2**62)), "sizes must be from 0 to"),
    ("filled", lambda: tensor((16384, 2**16), float_val=[1]), "must have 1,073,741,824 values, got 1"),
    ("negative", lambda: tensor((-1, 4), float_val=[1]), "sizes must be from 0 to"),
    ("two negatives", lambda: tensor((-2, -2), float_val=[1] * 4), "sizes must be from 0 to"),
    ("dimensions", lambda: tensor((1,) * 300, float_val=[1]), "at most 32 dimensions, got more"),
    ("type", lambda: tensor((1, 4), dtype=99), "tensors of type number 99"),
    ("broken content", lambda: tensor((1, 4), tensor_content=b"abc"), "whole numbers of 4 bytes, got 3"),
    ("too many", lambda: tensor((1, 4), float_val=[1] * 9), "must have 4 values, got 9"),
    ("none", lambda: tensor((1, 4)), "must have 4 values, got 0"),
    ("text", lambda: tensor((3,), dtype=7, string_val=[b"a"]), "must have 3 values, got 1"),
    ("strings", lambda: tensor((1,), dtype=7, string_val=[b""] * 20000), "at most 16,384 rows here, got 20,000"),
]


def test_short_messages_take_little(served: Served) -> None:
    assert status(served.address, GOOD)[0] is Code.OK
    before = served.most_bytes
    for _name, make, message in BAD:
        data = request(make())
        start = time.monotonic()
        code, details = status(served.address, data)
        assert (code, message in details) == (Code.INVALID_ARGUMENT, True), details
        assert time.monotonic() - start < 5
    assert status(served.address, b"\xff" * 1000) == (Code.INVALID_ARGUMENT, "the message is no PredictRequest")
    unknown = tensor((), float_val=[1])
    unknown.tensor_shape.unknown_rank = True
    assert "of unknown rank" in status(served.address, request(unknown))[1]
    bomb = gzip.compress(bytes(300 * MB))
    assert len(bomb) < MB
    code, details = status(served.address, bytes(300 * MB), compression=grpc.Compression.Gzip)
    assert (code, details) == (Code.RESOURCE_EXHAUSTED, "Decompressed message larger than max")
    assert served.most_bytes - before < 160 * MB  # one message may have 64
    assert status(served.address, GOOD)[0] is Code.OK
    assert served.interrupt() == (0, "")


def test_half_open_connections_garbage_and_floods_leave_room(served: Served) -> None:
    host, port = served.address.split(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(150)]
    for one in sockets[:50]:
        one.sendall(os.urandom(2000))
    for one in sockets[50:100]:
        one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert status(served.address, GOOD, 10)[0] is Code.OK
    with half_open(served.address, 60), ThreadPoolExecutor(32) as threads:
        start = time.monotonic()
        codes = {code for code, _ in threads.map(lambda _: status(served.address, GOOD, 60), range(200))}
        assert codes <= {Code.OK, Code.RESOURCE_EXHAUSTED}
        assert status(served.address, GOOD, 10)[0] is Code.OK
        assert time.monotonic() - start < 60
    deadline = time.monotonic() + 30
    for one in sockets:  # the server ends what never became a connection
        one.settimeout(max(0.1, deadline - time.monotonic()))
        with one:
            try:
                while one.recv(65536):
                    pass
            except ConnectionError:
                pass
    assert served.interrupt() == (0, "")


@contextmanager
def half_open(address: str, number: int) -> Iterator[None]:
    """Begin calls whose request never comes."""
    end = threading.Event()

    def nothing() -> Iterator[bytes]:
        end.wait()
        yield from ()

    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        calls = [channel.stream_unary(PREDICT).future(nothing()) for _ in range(number)]
        try:
            yield
        finally:
            for begun in calls:
                begun.cancel()
            end.set()


def torch_config(program: Path) -> dict[str, Any]:
    return {"kind": "torch", "model": program.name, "input": INPUT, "device": "cpu"}


def test_a_request_that_never_arrives_gives_its_thread_back(program: Path, tmp_path: Path) -> None:
    options = ServeOptions(threads=1, max_queued=200, receive_s=0.3)
    with TeacherServer(torch_config(program), options=options, base=tmp_path) as server, half_open(server.address, 150):
        start = time.monotonic()
        # on a busy machine a good request, too, may be late; clients repeat what was cancelled
        assert any(status(server.address, GOOD)[0] is Code.OK for _ in range(5))
        assert time.monotonic() - start < 10
        with grpc.insecure_channel(server.address) as channel:
            dropped = channel.stream_unary(PREDICT).future(_slowly())
            assert dropped.exception(timeout=10).code() is Code.CANCELLED


def _slowly() -> Iterator[bytes]:
    time.sleep(3)
    yield GOOD


def test_calls_beyond_the_queue_are_told_to_come_again(program: Path, tmp_path: Path) -> None:
    options = ServeOptions(threads=1, max_queued=2)
    with TeacherServer(torch_config(program), options=options, base=tmp_path) as server:
        model, release = server._teacher.logits, threading.Event()

        def slow(batch: pa.RecordBatch) -> np.ndarray:
            release.wait(30)
            return model(batch)

        server._teacher.logits = slow  # type: ignore[method-assign]
        with ThreadPoolExecutor(12) as threads:
            waiting = [threads.submit(status, server.address, GOOD) for _ in range(12)]
            time.sleep(1)
            turned_away = [one for one in waiting if one.done()]
            assert len(turned_away) == 9
            assert {one.result()[0] for one in turned_away} == {Code.RESOURCE_EXHAUSTED}
            release.set()
            assert [one.result()[0] for one in waiting].count(Code.OK) == 3


def test_nobody_is_answered_who_has_gone(program: Path, tmp_path: Path) -> None:
    with TeacherServer(torch_config(program), options=ServeOptions(threads=1), base=tmp_path) as server:
        model, release, asked = server._teacher.logits, threading.Event(), []

        def slow(batch: pa.RecordBatch) -> np.ndarray:
            asked.append(len(batch))
            release.wait(30)
            return model(batch)

        server._teacher.logits = slow  # type: ignore[method-assign]
        with ThreadPoolExecutor(8) as threads:
            first = threads.submit(status, server.address, GOOD)
            while not asked:
                time.sleep(0.01)
            gone = [threads.submit(status, server.address, GOOD, 0.3) for _ in range(5)]
            assert {one.result()[0] for one in gone} == {Code.DEADLINE_EXCEEDED}
            release.set()
            assert first.result()[0] is Code.OK
        time.sleep(0.3)
        assert asked == [1]


def test_waiting_requests_are_bounded_in_bytes(program: Path, tmp_path: Path) -> None:
    options = ServeOptions(threads=1, max_message_bytes=4096)
    with TeacherServer(torch_config(program), options=options, base=tmp_path) as server:
        model, release = server._teacher.logits, threading.Event()

        def slow(batch: pa.RecordBatch) -> np.ndarray:
            release.wait(30)
            return model(batch)

        server._teacher.logits = slow  # type: ignore[method-assign]
        large = request(to_proto(np.zeros((200, 4), np.float32)))
        assert 3000 < len(large) < 4096
        with ThreadPoolExecutor(20) as threads:
            waiting = [threads.submit(status, server.address, large) for _ in range(20)]
            time.sleep(1)
            refused = [one.result() for one in waiting if one.done()]
            assert len(refused) == 20 - 8 * 4096 // len(large)
            assert set(refused) == {(Code.RESOURCE_EXHAUSTED, "too many requests wait here; ask again later")}
            release.set()


@pytest.mark.parametrize(
    ("host", "options", "refused"),
    [
        ("127.0.0.1", {}, False),
        ("127.8.8.8", {}, False),
        ("localhost", {}, False),
        ("::1", {}, False),
        ("0.0.0.0", {}, True),
        ("::", {}, True),
        ("10.1.2.3", {}, True),
        ("teacher.internal", {}, True),
        ("0.0.0.0", {"insecure": True}, False),
        ("0.0.0.0", {"cert_file": "c", "key_file": "k"}, False),
    ],
)
def test_other_machines_are_served_with_encryption_or_on_demand(host: str, options: Any, refused: bool) -> None:
    if not refused:
        assert ServeOptions(host=host, **options).host == host
        return
    with pytest.raises(
        ValueError, match=rf"^host {host} is reached from other machines.*--cert-file.*or insecure \(--ins"
    ):
        ServeOptions(host=host, **options)


def test_an_address_of_the_sixth_version_is_in_brackets(program: Path, tmp_path: Path) -> None:
    with TeacherServer(torch_config(program), options=ServeOptions(host="::1"), base=tmp_path) as server:
        assert server.address == f"[::1]:{server.port}"
        assert status(server.address, GOOD)[0] is Code.OK


def test_long_errors_arrive(connect: Connect) -> None:
    class Wordy(Linear):
        def logits(self, batch: pa.RecordBatch) -> np.ndarray:
            if len(batch) > 8:
                raise RuntimeError("x" * 100_000)
            return super().logits(batch)

    with serving(Wordy()) as address, pytest.raises(RequestRefused) as caught:
        connect(address, batch_rows=40).logits(BATCH)
    assert "INTERNAL: RuntimeError: xxx" in str(caught.value)
    assert len(str(caught.value)) < 1200


class Rogue:
    """A server that describes itself well and answers Predict as it is told, once it was probed."""

    def __init__(self, change: Callable[[Any], None], after: int = 1, top_k: bool = False) -> None:
        self.change, self.after, self.top_k = change, after, top_k

    @contextmanager
    def running(self) -> Iterator[str]:
        from distilbeam.inputs.config import InputConfig
        from distilbeam.teacher.tfserving.service import ModelService

        service = ModelService(Linear(), InputConfig.model_validate(INPUT), "teacher", 5, 2 if self.top_k else None)
        honest = service.predict

        def predict(asked: Any) -> Any:
            answer = honest(asked)
            self.after -= 1
            if self.after < 0:
                self.change(answer)
            return answer

        service.predict = predict  # type: ignore[method-assign]
        with ThreadPoolExecutor(4) as threads:
            server = grpc.server(threads)
            server.add_generic_rpc_handlers(service.handlers())
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            try:
                yield f"127.0.0.1:{port}"
            finally:
                server.stop(None).wait()


def _put(name: str, make: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda answer: answer.outputs[name].CopyFrom(make())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_put("logits", lambda: tensor((40, 2**24), float_val=[1])), "cannot be read: a tensor of shape"),
        (_put("logits", lambda: tensor((40, 2**40), float_val=[1])), "cannot be read: a tensor of shape"),
        (_put("logits", lambda: tensor((-40, -7), float_val=[1])), "cannot be read: a tensor of shape"),
        (_put("logits", lambda: tensor((2, CLASSES), float_val=[1])), "has the shape [2, 7], 40 rows were asked"),
        (_put("logits", lambda: tensor((), float_val=[1])), "has the shape [], 40 rows were asked"),
        (
            _put("logits", lambda: tensor((40, 1), dtype=7, string_val=[b"1.5"] * 40)),
            "floating-point numbers, got text",
        ),
        (_put("logits", lambda: tensor((40, 7), dtype=3, int_val=[1])), "floating-point numbers, got int32"),
        (_put("logits", lambda: tensor((40, 7), dtype=8)), "tensors of type number 8"),
        (lambda answer: answer.outputs.clear(), "has no logits, only nothing"),
    ],
)
def test_a_rogue_answer_is_refused_before_it_is_made(connect: Connect, change: Any, message: str) -> None:
    with Rogue(change).running() as address:
        remote = connect(address)
        with pytest.raises(RequestRefused) as caught:
            remote.logits(BATCH)
    assert message in str(caught.value)


def test_answers_keep_their_number_of_classes(connect: Connect) -> None:
    with Rogue(_put("logits", lambda: tensor((40, 9), float_val=[1]))).running() as address:
        remote = connect(address)
        with pytest.raises(TeacherChanged, match="model 'teacher' had 7 classes, now 9; put the former model back"):
            ask(remote, BATCH, CLASSES)


SPARSE = {"top_k_logprobs": (40, 2), "top_k_classes": (40, 2), "tail_logmass": (40,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_put("num_classes", lambda: to_proto(np.array(2**31 - 1, np.int32))), "2,147,483,647 classes, more than"),
        (_put("num_classes", lambda: to_proto(np.array(-1, np.int32))), "k best classes disagree"),
        (_put("num_classes", lambda: to_proto(np.array(1.5, np.float32))), "num_classes must be one whole number"),
        (_put("top_k_classes", lambda: to_proto(np.full((40, 2), 99, np.int32))), "must be from 0 to 6"),
        (_put("top_k_classes", lambda: to_proto(np.full((40, 2), -1, np.int32))), "must be from 0 to 6"),
        (_put("top_k_classes", lambda: to_proto(np.zeros((40, 3), np.int32))), "k best classes disagree"),
        (_put("tail_logmass", lambda: to_proto(np.zeros(3, np.float32))), "tail_logmass is of [3], 40 rows"),
        (_put("top_k_logprobs", lambda: to_proto(np.zeros((40, 2), np.int32))), "must be whole numbers, their log"),
    ],
)
def test_a_rogue_server_of_the_best_classes_is_refused(connect: Connect, change: Any, message: str) -> None:
    with Rogue(change, top_k=True).running() as address:
        remote = connect(address)
        with pytest.raises(RequestRefused) as caught:
            remote.logits(BATCH)
    assert message in str(caught.value)


def test_a_rogue_shape_of_the_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from distilbeam.teacher.tfserving.service import ModelService

    monkeypatch.setattr(ModelService, "_input_type", lambda _: (1, [-1, 2**20, 2**20]))
    with (
        serving(Linear()) as address,
        pytest.raises(ValueError, match="more than 16,777,216 numbers; check the server, or"),
    ):
        client(address, input={"column": "x"})


def test_an_answer_that_is_no_message_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    garbage = grpc.unary_unary_rpc_method_handler(lambda _, __: b"\xff" * 100)
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        names = {"GetModelMetadata": garbage, "Predict": garbage}
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("tensorflow.serving.PredictionService", names)]
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        with pytest.raises(RequestRefused, match=f"^127.0.0.1:{port}: the answer is no GetModelMetadataResponse$"):
            client(f"127.0.0.1:{port}")
        server.stop(None).wait()
    assert not caplog.records


def test_large_answers_are_asked_for_in_pieces(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distilbeam.teacher.tfserving.client._MOST_ANSWERED", CLASSES * 16)
    teacher = Linear()
    with serving(teacher) as address:
        remote = connect(address)
        teacher.rows.clear()
        np.testing.assert_allclose(remote.logits(BATCH), X @ Linear.weights, rtol=1e-5, atol=1e-6)
    assert sorted(teacher.rows, reverse=True) == [16, 16, 8]


def test_one_value_stands_for_a_mebibyte_at_most() -> None:
    assert to_array(tensor((2**18,), float_val=[2.5])).tolist() == [2.5] * 2**18
    with pytest.raises(ValueError, match="must have 262,146 values, got 1"):
        to_array(tensor((2**18 + 2,), float_val=[2.5]))


def test_headers_are_lowered_and_their_secrets_stay_out_of_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    from distilbeam.teacher.config import HeaderConfig

    monkeypatch.setenv("KEY", "secret")
    assert request_headers({"Authorization": HeaderConfig(env="KEY", prefix="Bearer ")}) == [
        ("authorization", "Bearer secret")
    ]
    monkeypatch.setenv("KEY", "secret\nsecond")
    with pytest.raises(ValueError, match=r"teacher.headers.x: its value must be one line of printable ASCII") as caught:
        request_headers({"x": HeaderConfig(env="KEY")})
    assert "secret" not in str(caught.value)


def test_the_limits_are_documented() -> None:
    assert Limits().rows == ServeOptions().max_rows == 16384
    assert Limits().receive_s == ServeOptions().receive_s
