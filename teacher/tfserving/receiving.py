"""Requests of clients that nobody knows: received in time, few at once, and read as what they are or refused.

A call waits in a queue that holds none of its bytes until a thread takes it. The thread receives the message for at most
`receive_s` (a client that stops in the middle is dropped), and then waits for one of the places in which messages are read
and answered; what waits there is bounded in bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

Code = grpc.StatusCode
_DETAIL_CHARACTERS = 1000  # of a status: it travels as a header, and those end at 8 KiB


class Refused(Exception):  # noqa: N818  (becomes a status, not a traceback)
    """A request that cannot be served.

    Attributes:
      code: status of the answer.
    """

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Limits:
    """What a server takes from its clients.

    Attributes:
      rows: most rows in a request.
      receive_s: seconds in which a request must have arrived, from when a thread waits for it.
      waiting_bytes: most bytes of requests that have arrived and are not yet answered.
      at_once: requests that are read and answered at once.
    """

    rows: int = 16384
    receive_s: float = 20.0
    waiting_bytes: int = 512 * 2**20
    at_once: int = 8


class Gate:
    """Makes handlers of methods that share the limits.

    Args:
      limits: the limits.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._reading = threading.Lock()  # a message can take many times its size, until it is refused
        self._places = threading.BoundedSemaphore(limits.at_once)
        self._lock = threading.Lock()
        self._waiting_bytes = 0

    def handler(
        self,
        answer: Callable[[Any], Any],
        request_type: Any,
        *,
        check: Callable[[Any], None] = lambda _: None,
        at_once: bool = False,
    ) -> Handler:
        """Make the handler of a method.

        Args:
          answer: function from a request to the answer; it may raise `Refused`.
          request_type: class of the request.
          check: raises `Refused` where a request is not worth to be kept.
          at_once: answer without waiting for a place, which suits what costs nothing.
        """

        def read(data: bytes, context: grpc.ServicerContext) -> bytes:
            try:
                with self._reading:
                    request = _parsed(data, request_type)
                    check(request)
                reply: bytes = answer(request).SerializeToString()
            except Refused as e:
                context.abort(e.code, _shortened(str(e)))
            return reply

        def in_turn(data: bytes, context: grpc.ServicerContext) -> bytes:
            with self._counted(len(data), context), self._places:
                return read(data, context) if context.is_active() else b""  # nobody waits for an answer any more

        return Handler(read if at_once else in_turn, self.limits.receive_s)

    @contextmanager
    def _counted(self, size: int, context: grpc.ServicerContext) -> Iterator[None]:
        with self._lock:
            fits = self._waiting_bytes + size <= self.limits.waiting_bytes or not self._waiting_bytes
            self._waiting_bytes += size if fits else 0
        if not fits:
            context.abort(Code.RESOURCE_EXHAUSTED, "too many requests wait here; ask again later")
        try:
            yield
        finally:
            with self._lock:
                self._waiting_bytes -= size


class Handler(grpc.RpcMethodHandler):
    """A method of one request and one answer, received as a stream so that its arrival can be timed.

    Args:
      answer: function from the request's bytes and the context to the answer's bytes.
      receive_s: seconds in which the request must have arrived.
    """

    request_streaming = True
    response_streaming = False
    request_deserializer = None
    response_serializer = None
    unary_stream = None
    stream_stream = None

    def __init__(self, answer: Callable[[bytes, grpc.ServicerContext], bytes], receive_s: float) -> None:
        self.unary_unary, self._receive_s = answer, receive_s

    def stream_unary(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Receive a request and answer it."""
        late = threading.Timer(self._receive_s, context.cancel)
        late.daemon = True
        late.start()
        try:
            data = next(requests, None)
        except grpc.RpcError:  # the client went away, or was too slow
            return b""
        finally:
            late.cancel()
        if data is None:
            if context.is_active():
                context.abort(Code.INVALID_ARGUMENT, "the request has no message")
            return b""
        return self.unary_unary(data, context)


def _parsed(data: bytes, request_type: Any) -> Any:
    try:
        return request_type.FromString(data)
    except DecodeError as e:
        raise Refused(Code.INVALID_ARGUMENT, f"the message is no {request_type.DESCRIPTOR.name}") from e


def _shortened(text: str) -> str:
    return text if len(text) <= _DETAIL_CHARACTERS else text[:_DETAIL_CHARACTERS] + "..."
