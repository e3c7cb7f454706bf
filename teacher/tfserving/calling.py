"""Remote calls that are repeated when, and only when, the reason for their failure can pass.

The wait before the i-th repetition is uniform between 0 and min(longest, first * 2^(i - 1)), so that many workers that failed
together do not come back together (full jitter: Brooker, Exponential Backoff and Jitter, AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from distilbeam.teacher.config import TfServingConfig
from distilbeam.teacher.protocol import TeacherMisfit, TeacherUnavailable
from distilbeam.teacher.tfserving.channels import open_channel, request_headers

Code = grpc.StatusCode
PASSING = frozenset({Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED, Code.DEADLINE_EXCEEDED, Code.ABORTED, Code.CANCELLED})
MISFIT = "the teacher does not fit: "  # begins what `service` says of a teacher that can answer nobody
_NOT_THE_ROWS = frozenset({Code.NOT_FOUND, Code.PERMISSION_DENIED, Code.UNAUTHENTICATED, Code.UNIMPLEMENTED})

_DETAIL_CHARACTERS = 1000


class RequestRefused(RuntimeError):  # noqa: N818  (what the server did)
    """The server refused this request; another with fewer rows may be answered."""


class Servers:
    """Several addresses of one model, asked in turn.

    Args:
      config: addresses, deadline, attempts, waits, credentials and limits.
      sleep: waits for a number of seconds.
      jitter: gives a random number between two bounds.
    """

    def __init__(
        self,
        config: TfServingConfig,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._config, self._sleep, self._jitter = config, sleep, jitter
        self._channels = [open_channel(address, config) for address in config.addresses]
        self._turn = itertools.count()
        self._lock = threading.Lock()

    def call(self, method: str, request: Any, response_type: Any) -> Any:
        """Call a method of the service.

        Args:
          method: full name, `/package.Service/Method`.
          request: the message.
          response_type: class of the answer.

        Returns:
          The answer.

        Raises:
          TeacherUnavailable: every attempt failed for a reason that could have passed, or the server does not serve the
            model to us.
          RequestRefused: the server refused this request.
        """
        failures: list[str] = []
        for attempt in range(self._config.attempts):
            if attempt:
                self._sleep(wait_before(attempt, self._config.first_wait_s, self._config.longest_wait_s, self._jitter))
            with self._lock:
                place = next(self._turn) % len(self._channels)
            try:
                data = self._once(place, method, request)
            except grpc.RpcError as e:
                failures.append(f"{self._config.addresses[place]}: {_reason(e)}")
                if not _can_pass(e):
                    raise _final(e, failures[-1]) from e
            else:
                return _parsed(data, response_type, self._config.addresses[place])
        raise TeacherUnavailable(
            f"the teacher did not answer in {self._config.attempts} attempts ({failures[-1]}); start the server or raise "
            "teacher.attempts or teacher.timeout_s, and run again: what is done is kept"
        )

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            channel.close()

    def _once(self, place: int, method: str, request: Any) -> bytes:
        """Ask once; the answer's bytes are read by us, for gRPC would log what it cannot read."""
        stub = self._channels[place].unary_unary(method, request_serializer=type(request).SerializeToString)
        answer: bytes = stub(request, timeout=self._config.timeout_s, metadata=request_headers(self._config.headers))
        return answer


def wait_before(attempt: int, first_s: float, longest_s: float, jitter: Callable[[float, float], float]) -> float:
    """Return how long to wait before an attempt.

    Args:
      attempt: its number; 1 is the first repetition.
      first_s: longest wait before that one, in seconds.
      longest_s: longest wait before any.
      jitter: gives a random number between two bounds.
    """
    return jitter(0, min(longest_s, first_s * 2 ** (attempt - 1)))


def _parsed(data: bytes, response_type: Any, address: str) -> Any:
    try:
        return response_type.FromString(data)
    except DecodeError as e:
        raise RequestRefused(f"{address}: the answer is no {response_type.DESCRIPTOR.name}") from e


def _can_pass(error: grpc.RpcError) -> bool:
    too_large = error.code() is Code.RESOURCE_EXHAUSTED and "larger than max" in (error.details() or "")
    return error.code() in PASSING and not too_large


def _final(error: grpc.RpcError, failure: str) -> Exception:
    if error.code() is Code.FAILED_PRECONDITION and (error.details() or "").startswith(MISFIT):
        return TeacherMisfit(f"the server cannot answer as it is configured ({failure})")
    if error.code() in _NOT_THE_ROWS:
        return TeacherUnavailable(
            f"the teacher refuses every request ({failure}); check address, model and credentials"
        )
    return RequestRefused(failure)


def _reason(error: grpc.RpcError) -> str:
    return f"{error.code().name}: {(error.details() or '')[:_DETAIL_CHARACTERS]}"


def in_window(work: Callable[[Any], Any], items: Sequence[Any], executor: Any) -> list[Any]:
    """Do work on items in an executor and return the results in order; the first failure cancels what has not begun."""
    futures = [executor.submit(work, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
