"""A Pub/Sub subscription while it is read: what is delivered, what is held until its label is committed, what is acknowledged.

Pub/Sub delivers a message until it is acknowledged, and now and then once more. Here it is acknowledged when the pane that
settles it is committed, which the dataset says, whichever process wrote it. A message that comes again before that is held
already; one that comes after it, to this job or to the next, is looked for among the ids that the panes of its window have
settled. A message's window follows from the message alone, so that it is looked for in the right one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distilbeam.pipelines.streaming.decode import Decoder
from distilbeam.pipelines.streaming.kafka_reader import event_time_s
from distilbeam.pipelines.streaming.message import UNKNOWN, Message
from distilbeam.pipelines.streaming.settled_ids import SettledIds
from distilbeam.pipelines.streaming.stop_file import stop_wanted

log = logging.getLogger("distilbeam.stream")

POLL_S = 0.1
_LOOK_S = 0.25  # between two looks for what has been committed
_HELD = 100_000  # messages, and bytes of them, that are held: then the stream rests until some are acknowledged
_HELD_BYTES = 2**29
_LEASE_S = 3_600  # that a message is held at least, before Pub/Sub delivers it to somebody else
_ANSWER_S = 15.0
_readers: dict[PubsubReading, PubsubReader] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class PubsubReading:
    """How a subscription is read.

    Attributes:
      subscription: its full name, `projects/PROJECT/subscriptions/NAME`.
      out: the soft-label dataset, which says what is committed and has the file that ends the reading.
      window_s: length of a window in seconds.
      lateness_s: how long after its window's end a message may have been sent.
      strict: whether nothing is taken behind the watermark, since a window's choice is made once.
      idle_s: how far behind the clock time is when nothing comes.
      batch_rows: most messages of a batch.
      max_wait_s: seconds that messages wait for their batch to fill.
      clock: says when a message's event was; None for the time at which it was published.
    """

    subscription: str
    out: str
    window_s: float = 60.0
    lateness_s: float = 0.0
    strict: bool = False
    idle_s: float = 2.0
    batch_rows: int = 256
    max_wait_s: float = 1.0
    clock: Decoder | None = None

    @property
    def name(self) -> str:
        """What the messages come from, as labels and dead letters have it."""
        return self.subscription


@dataclass(frozen=True)
class Delivered:
    """A message that nobody has settled.

    Attributes:
      message: the message.
      time_s: a time in the window that it belongs to, in seconds since 1970: its event's or, where it is late, its own.
      late: whether it was sent longer than the allowed lateness after its window's end.
    """

    message: Message
    time_s: float
    late: bool


class PubsubReader:
    """A subscription's stream of messages and what became of them.

    Args:
      reading: how to read.
    """

    def __init__(self, reading: PubsubReading) -> None:
        from google.cloud import pubsub_v1

        self.reading = reading
        self.watermark_s = -float("inf")
        self.ended = False
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._held: dict[str, Any] = {}  # by id, a message that was given out, as it was delivered last
        self._holding = threading.Lock()
        # when messages came, and the earliest time that they had; at first those that wait are yet to come
        self._recent: list[tuple[float, float]] = [(time.monotonic(), -float("inf"))]
        self._settled = SettledIds(reading.out, reading.subscription)
        self._settled.look()
        self.told = False  # to end
        self._stop_looked = 0.0
        self._closing = threading.Event()
        self._client = pubsub_v1.SubscriberClient()
        flow = pubsub_v1.types.FlowControl(
            max_messages=_HELD, max_bytes=_HELD_BYTES, max_lease_duration=max(_LEASE_S, 3 * reading.window_s)
        )
        self._stream = self._client.subscribe(reading.subscription, self._arrived.put, flow_control=flow)
        self._acknowledging = threading.Thread(target=self._acknowledge, daemon=True)
        self._acknowledging.start()

    def poll(self) -> list[Delivered]:
        """Return messages that nobody has settled and that were not returned before.

        Raises:
          RuntimeError: the subscription cannot be read any more.
        """
        if self._stream.done() and not self.ended:
            raise RuntimeError(f"{self.reading.subscription} cannot be read any more: {self._stream.exception()}")
        found: list[Delivered] = []
        end = time.monotonic() + POLL_S
        while len(found) < self.reading.batch_rows:
            try:
                raw = self._arrived.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
            with self._holding:
                delivered = self._look_at(raw)
            if delivered is not None:
                found.append(delivered)
        if found:
            self._recent.append((time.monotonic(), min(each.time_s for each in found)))
        return found

    def _look_at(self, raw: Any) -> Delivered | None:
        known = raw.message_id in self._held
        self._held[raw.message_id] = raw  # the delivery before has no say any more
        if known:
            return None
        delivered = self._placed(raw)
        if self._settled.has(raw.message_id, delivered.time_s):
            del self._held[raw.message_id]
            raw.ack()
            return None
        return delivered

    def _placed(self, raw: Any) -> Delivered:
        reading, sent_s = self.reading, raw.publish_time.timestamp()
        message = to_message(raw, raw.message_id)
        time_s = event_time_s(message, reading.clock, sent_s)
        ends_s = (time_s // reading.window_s + 1) * reading.window_s
        late = ends_s + reading.lateness_s <= sent_s
        return Delivered(message, sent_s if late else time_s, late)

    def new_watermark(self) -> float:
        """Return the time, in seconds, before which hardly a message is left: Pub/Sub says nothing of what it keeps."""
        start = time.monotonic() - self.reading.idle_s
        self._recent = [item for item in self._recent if item[0] >= start]
        return min((time_s for _, time_s in self._recent), default=time.time() - self.reading.idle_s)

    def told_to_stop(self) -> bool:
        """Tell whether the reading is to end, looking at most once a second."""
        if not self.told and time.monotonic() - self._stop_looked >= 1:
            self._stop_looked = time.monotonic()
            self.told = stop_wanted(self.reading.out)
        return self.told

    def _acknowledge(self) -> None:
        while not self._closing.wait(_LOOK_S):
            try:
                self._acknowledge_settled()
            except Exception as e:  # noqa: BLE001  # of a store that does not answer now, and of what it raises
                log.warning("what is committed in %s could not be looked at: %s", self.reading.out, e)

    def _acknowledge_settled(self) -> None:
        for message_id in self._settled.look():
            with self._holding:
                raw = self._held.pop(message_id, None)
            if raw is not None:
                raw.ack()

    def close(self) -> None:
        """Acknowledge what is committed, give the rest back to Pub/Sub, and end the stream."""
        self.ended = True
        self._closing.set()
        self._acknowledging.join()
        self._settled.hurry()
        self._acknowledge_settled()
        waiting = list(self._held.values())
        while not self._arrived.empty():
            waiting.append(self._arrived.get())
        for raw in waiting:
            raw.nack()
        self._stream.cancel()
        self._stream.exception(timeout=_ANSWER_S)  # waits until what was said is sent
        self._client.close()


def to_message(raw: Any, message_id: str) -> Message:
    """Make a message of Pub/Sub's own, by its client or by Beam."""
    sent = raw.publish_time
    time_ms = UNKNOWN if sent is None else int(sent.timestamp() * 1000)
    headers = tuple((name, value.encode()) for name, value in (raw.attributes or {}).items())
    key = raw.ordering_key.encode() if raw.ordering_key else None
    return Message(UNKNOWN, UNKNOWN, time_ms, key, raw.data, headers, message_id)


def take_pubsub_reader(reading: PubsubReading) -> PubsubReader:
    """Return the reader of this process, a new one where there is none."""
    with _lock:
        reader = _readers.get(reading)
        if reader is None or reader.ended:
            reader = _readers[reading] = PubsubReader(reading)
        return reader


def close_pubsub_readers() -> None:
    """Acknowledge what is committed and end the streams of this process, of jobs that have ended."""
    with _lock:
        while _readers:
            _readers.popitem()[1].close()


def require_subscription(name: str) -> None:
    """Check that a subscription is there and can be read.

    Raises:
      ValueError: its name is not a full one, it is not there, or it is not this account's to read.
    """
    parts = name.split("/")
    if len(parts) != 4 or parts[::2] != ["projects", "subscriptions"] or not all(parts):
        raise ValueError(f"--source takes pubsub:projects/PROJECT/subscriptions/NAME, got 'pubsub:{name}'")
    with _errors_in_a_sentence(name):
        from google.cloud import pubsub_v1

        with pubsub_v1.SubscriberClient() as client:
            # its readers may not look at the subscription itself, but they may ask for messages
            request = {"subscription": name, "max_messages": 1, "return_immediately": True}
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of a stream of such pulls
                found = client.pull(request=request, timeout=_ANSWER_S, retry=None).received_messages
            if found:
                give_back = {"subscription": name, "ack_ids": [found[0].ack_id], "ack_deadline_seconds": 0}
                client.modify_ack_deadline(request=give_back, timeout=_ANSWER_S)


@contextmanager
def _errors_in_a_sentence(name: str) -> Iterator[None]:
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (GoogleAPIError, GoogleAuthError) as e:
        raise ValueError(f"--source: {name} cannot be read: {str(e).splitlines()[0]}") from e
