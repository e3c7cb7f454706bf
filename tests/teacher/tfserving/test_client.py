"""The client over a real socket: values, metadata, retries, headers, limits."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pytest
from scipy.special import log_softmax
from served_linear import BATCH, CLASSES, INPUT, Code, Connect, Linear, Script, X, client, serving

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.teacher import TeacherChanged, TeacherUnavailable, ask
from distilbeam.teacher.config import TfServingConfig
from distilbeam.teacher.softlabels import SoftLabelSpec, encode
from distilbeam.teacher.tfserving.calling import Servers
from distilbeam.teacher.tfserving.messages import load_messages
from distilbeam.teacher.tfserving.service import ModelService


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
