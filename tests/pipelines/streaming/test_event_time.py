"""Event time of a column: what says a time, what does not, and which window a message falls into."""

from __future__ import annotations

import json
from typing import Any

import pytest

from distilbeam.pipelines.streaming.decode import Decoder, make_decoder
from distilbeam.pipelines.streaming.kafka_reader import event_time_s
from distilbeam.pipelines.streaming.message import UNKNOWN, Message

SECONDS = 1_769_824_800.0  # 2026-01-31T02:00:00Z


def message(timestamp_ms: int = 5_000, **row: Any) -> Message:
    return Message(0, 7, timestamp_ms, b"k", json.dumps(row).encode())


@pytest.mark.parametrize(
    ("type_", "value", "seconds"),
    [
        ("int64", 1_769_824_800_500, SECONDS + 0.5),
        ("int64", 0, 0.0),
        ("float64", SECONDS + 0.25, SECONDS + 0.25),
        ("string", "2026-01-31T02:00:00Z", SECONDS),
        ("string", "2026-01-31T03:00:00+01:00", SECONDS),
        ("string", "2026-01-31T02:00:00", SECONDS),
        ("string", "2026-01-31", SECONDS - 7_200),
        ("int64", -1, None),
        ("int64", True, None),
        ("int64", "1769824800500", None),
        ("int64", 10**400, None),
        ("float64", float("nan"), None),
        ("float64", 1e300, None),
        ("string", "yesterday", None),
        ("string", "1900-01-01", None),
        ("string", None, None),
    ],
)
def test_what_a_column_says(type_: str, value: Any, seconds: float | None) -> None:
    decoder = make_decoder(f"at:{type_}", "json", None, "", "at")
    one = message(at=value)
    assert decoder.time_s(one) == seconds
    decoded = decoder([message(at=value), one])
    assert decoded.good == ((0, 1) if seconds is not None else ())
    if seconds is None:
        assert decoded.refused[0].startswith("at must be ")
        assert decoded.refused[0].endswith(f"(--event-time), got {value!r:.80}")


def test_the_column_may_be_a_header_and_is_otherwise_the_messages_own_time() -> None:
    decoder = make_decoder("key:string,at:string=header.at", "json", None, "", "at")
    said = message(key="a")._replace(headers=(("at", b"2026-01-31T02:00:00Z"),))
    assert event_time_s(said, decoder, 2e9) == SECONDS
    assert event_time_s(said, None, 2e9) == 5.0
    assert event_time_s(message(key="a"), decoder, 2e9) == 5.0, "a message that will be refused stays where it is"
    assert event_time_s(message()._replace(value=b"{"), decoder, 2e9) == 5.0
    assert event_time_s(said, decoder, SECONDS - 10) == SECONDS - 10, "nothing is later than now"
    assert event_time_s(message(UNKNOWN), None, 9.0) == 9.0


def test_columns_that_cannot_be_a_time() -> None:
    for name, schema, sentence in (
        ("at", "key:string", r"--event-time must be a column of --schema \(key\), got 'at'"),
        ("x", "key:string,x:float32[4]", r"--event-time: x must be int64, float64 or string, got float32 \[4\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_decoder(schema, "json", None, "", name)
    assert Decoder("at:int64").event_time == ""
