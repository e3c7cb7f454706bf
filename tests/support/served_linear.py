"""A teacher of known weights, served over a real socket, and clients of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pyarrow as pa

from distilbeam.inputs.config import InputConfig, make_input
from distilbeam.teacher import load_teacher
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


Connect = Callable[..., Any]
