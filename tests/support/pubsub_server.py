"""A small Pub/Sub: topics, subscriptions, leases and redelivery over the real protocol (google.pubsub.v1, gRPC)."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest

ADDRESS = "PUBSUB_EMULATOR_HOST"  # what Google's clients look at
_LOOK_S = 0.02


@dataclass
class Kept:
    """A message of a subscription.

    Attributes:
      message: the message.
      due_s: when it is to be delivered; while it is on lease, when that ends.
      ack_id: of its latest delivery.
      deliveries: how often it was delivered.
      acknowledged: whether it was acknowledged.
    """

    message: Any
    due_s: float = 0.0
    ack_id: str = ""
    deliveries: int = 0
    acknowledged: bool = False


@dataclass
class Subscription:
    """A subscription.

    Attributes:
      topic: its topic.
      kept: its messages, by their ids.
      lease_s: how long a delivery is on lease where its reader does not say otherwise.
    """

    topic: str
    lease_s: float = 10.0
    kept: dict[str, Kept] = field(default_factory=dict)


class PubsubServer:
    """Publisher and Subscriber of one process, at `address`.

    What is not acknowledged is delivered again when its lease has ended or it was given back. `again_every` delivers every
    so many messages a second time at once, as Pub/Sub may; `deliver_again` everything, whether it was acknowledged or not.
    """

    def __init__(self) -> None:
        from google.pubsub_v1 import types

        self.types = types
        self.subscriptions: dict[str, Subscription] = {}
        self.forbidden: set[str] = set()
        self.again_every = 0
        self._lock = threading.RLock()
        self._ids = itertools.count(1_000)
        self._ack_ids = itertools.count(1)
        self._stopped = threading.Event()
        self._server = grpc.server(ThreadPoolExecutor(16))
        unary, streaming = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        self._serve("Publisher", {"Publish": (unary, self._publish, types.PublishRequest, types.PublishResponse)})
        empty = _Empty
        self._serve(
            "Subscriber",
            {
                "Pull": (unary, self._pull, types.PullRequest, types.PullResponse),
                "StreamingPull": (
                    streaming,
                    self._streaming_pull,
                    types.StreamingPullRequest,
                    types.StreamingPullResponse,
                ),
                "Acknowledge": (unary, self._acknowledge, types.AcknowledgeRequest, empty),
                "ModifyAckDeadline": (unary, self._modify, types.ModifyAckDeadlineRequest, empty),
            },
        )
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def _serve(self, service: str, methods: dict[str, Any]) -> None:
        handlers = {
            name: kind(work, request_deserializer=request.deserialize, response_serializer=response.serialize)
            for name, (kind, work, request, response) in methods.items()
        }
        handler = grpc.method_handlers_generic_handler(f"google.pubsub.v1.{service}", handlers)
        self._server.add_generic_rpc_handlers((handler,))

    def stop(self) -> None:
        """End it."""
        self._stopped.set()
        self._server.stop(None).wait()

    def deliver_again(self, name: str) -> None:
        """Deliver all messages of a subscription once more, as if no acknowledgement had come."""
        with self._lock:
            for kept in self.subscriptions[name].kept.values():
                kept.due_s, kept.acknowledged = 0.0, False

    def end_leases(self, name: str) -> None:
        """Let time pass: what is on lease at a subscription is to be delivered again."""
        with self._lock:
            for kept in self.subscriptions[name].kept.values():
                kept.due_s = 0.0

    def _publish(self, request: Any, context: Any) -> Any:  # noqa: ARG002
        with self._lock:
            ids = []
            for message in request.messages:
                message.message_id = str(next(self._ids))
                message.publish_time = datetime.now(UTC)
                ids.append(message.message_id)
                for subscription in self.subscriptions.values():
                    if subscription.topic == request.topic:
                        subscription.kept[message.message_id] = Kept(message)
            return self.types.PublishResponse(message_ids=ids)

    def _found(self, name: str, context: Any) -> Subscription:
        if name in self.forbidden:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "User not authorized to perform this action.")
        if name not in self.subscriptions:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Resource not found (resource={name.rpartition('/')[2]}).")
        return self.subscriptions[name]

    def _pull(self, request: Any, context: Any) -> Any:
        found = self._due(self._found(request.subscription, context), request.max_messages)
        return self.types.PullResponse(received_messages=found)

    def _streaming_pull(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        first = next(requests)
        subscription = self._found(first.subscription, context)
        subscription.lease_s = first.stream_ack_deadline_seconds or subscription.lease_s
        threading.Thread(target=lambda: [None for _ in _until_closed(requests)], daemon=True).start()
        while context.is_active() and not self._stopped.is_set():
            found = self._due(subscription, 100)
            if found:
                yield self.types.StreamingPullResponse(received_messages=found)
            else:
                time.sleep(_LOOK_S)

    def _due(self, subscription: Subscription, count: int) -> list[Any]:
        now, found = time.monotonic(), []
        with self._lock:
            for kept in subscription.kept.values():
                if kept.acknowledged or kept.due_s > now or len(found) >= count:
                    continue
                kept.deliveries += 1
                kept.ack_id = str(next(self._ack_ids))
                twice = (
                    self.again_every and kept.deliveries == 1 and not int(kept.message.message_id) % self.again_every
                )
                kept.due_s = now if twice else now + subscription.lease_s
                found.append(
                    self.types.ReceivedMessage(
                        ack_id=kept.ack_id, message=kept.message, delivery_attempt=kept.deliveries
                    )
                )
        return found

    def _acknowledge(self, request: Any, context: Any) -> Any:
        with self._lock:
            for kept in self._named(request, context):
                kept.acknowledged = True
        return _Empty()

    def _modify(self, request: Any, context: Any) -> Any:
        with self._lock:
            for kept in self._named(request, context):
                kept.due_s = time.monotonic() + request.ack_deadline_seconds
        return _Empty()

    def _named(self, request: Any, context: Any) -> list[Kept]:
        ack_ids = set(request.ack_ids)  # those of former deliveries mean nothing any more
        return [kept for kept in self._found(request.subscription, context).kept.values() if kept.ack_id in ack_ids]


class _Empty:
    """google.protobuf.Empty, which is no bytes."""

    @staticmethod
    def serialize(_: Any) -> bytes:
        return b""


def _until_closed(requests: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from requests
    except grpc.RpcError:
        return


@contextmanager
def pubsub() -> Iterator[PubsubServer]:
    """Run a server in the block, or skip the test where Pub/Sub's client is not installed."""
    pytest.importorskip("google.cloud.pubsub_v1", reason="needs the extra pubsub")
    server = PubsubServer()
    try:
        yield server
    finally:
        server.stop()


def publish(topic: str, values: Sequence[bytes], **attributes: str) -> list[str]:
    """Publish messages by Google's client to the server that the environment names; return their ids."""
    from google.cloud import pubsub_v1

    client = pubsub_v1.PublisherClient()
    ids = [each.result(30) for each in [client.publish(topic, value, **attributes) for value in values]]
    client.stop()
    return ids
