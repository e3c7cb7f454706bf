"""Beam's own connectors: event times, lateness by the message alone, and no message that the runner drops."""

from __future__ import annotations

import json
import time
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.testing import test_stream as beam_test_stream
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.transforms.window import FixedWindows
from apache_beam.utils.timestamp import Duration

from distilbeam.pipelines.streaming.beam_sources import StampMessages, gathered, runners_lateness_s
from distilbeam.pipelines.streaming.decode import make_decoder
from distilbeam.pipelines.streaming.message import UNKNOWN, Message
from distilbeam.pipelines.streaming.settings import StreamSettings

Events = beam_test_stream.TestStream
CLOCK = make_decoder("n:int64,at:int64", "json", None, "", "at")
DAY_S = 86_400


def message(n: int, at_s: float, sent_s: float) -> Message:
    value = json.dumps({"n": n, "at": int(at_s * 1000)}).encode()
    return Message(UNKNOWN, UNKNOWN, int(sent_s * 1000), None, value)


@pytest.mark.parametrize(
    ("at", "sent", "late"),
    [
        (0, 0, False),
        (0, 69, False),  # the window of a minute ends at 60 at the latest, ten seconds are allowed
        (-130, 0, True),
        (-5 * DAY_S, -5 * DAY_S, False),  # late is a message that was sent late, not one that is read late
        (-40 * DAY_S, -40 * DAY_S, True),  # no runner keeps its window
    ],
)
def test_what_is_late_is_said_by_the_message_alone(at: float, sent: float, late: bool) -> None:
    now = time.time() // 60 * 60 - 120
    ((stamped),) = StampMessages(60, 10, CLOCK).process(message(1, now + at, now + sent))
    assert stamped.value == (message(1, now + at, now + sent), late)
    if late:
        assert float(stamped.timestamp) == pytest.approx(time.time(), abs=30), "a window that is open"
    else:
        assert float(stamped.timestamp) == pytest.approx(now + at, abs=0.01)


def test_batches_tell_late_messages_apart() -> None:
    one, two, three = (message(n, n, n) for n in range(3))
    batches = list(gathered([(one, False), (two, True), (three, False)]))
    assert [(batch.messages, batch.late, batch.covers) for batch in batches] == [
        ((one, three), False, ()),
        ((two,), True, ()),
    ]
    placed = message(1, 1, 1)._replace(partition=2, offset=5)
    assert [batch.covers for batch in gathered([(placed, False)])] == [((2, 5, 5),)]


def test_a_message_behind_the_runners_watermark_is_not_dropped() -> None:
    now = time.time() // 60 * 60
    settings = StreamSettings(
        source="pubsub:s", out="o", schema="n:int64,at:int64", event_time="at", allowed_lateness_s=10
    )
    early, behind, late = message(1, now - 300, now), message(2, now - 290, now - 285), message(3, now - 700, now)
    events = Events().add_elements([early._replace(timestamp_ms=int((now - 300) * 1000))])
    events = events.advance_watermark_to(now - 30).add_elements([behind, late]).advance_watermark_to_infinity()
    with beam.Pipeline(options=PipelineOptions(["--streaming", "--runner=BundleBasedDirectRunner"])) as pipeline:
        stamped = pipeline | events | beam.ParDo(StampMessages(60, settings.allowed_lateness_s, CLOCK))
        windows = beam.WindowInto(FixedWindows(60), allowed_lateness=Duration(runners_lateness_s(settings)))
        met = stamped | windows | beam.Map(lambda item: (0, item)) | beam.GroupByKey() | beam.FlatMap(_numbers)
        assert_that(met, equal_to([(1, False), (2, False), (3, True)]), reify_windows=False)


def _numbers(item: tuple[int, Any]) -> list[tuple[int, bool]]:
    return [(json.loads(each.value)["n"], late) for each, late in item[1]]
