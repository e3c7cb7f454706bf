"""Event time that a message's content says: milliseconds since 1970 (int64), seconds (float64) or ISO 8601 (string)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from distilbeam.pipelines.ingest.columns import ColumnType

_LAST_S = 253_402_300_800.0  # the year 10000
_FORMS = {
    "int64": "milliseconds since 1970",
    "float64": "seconds since 1970",
    "string": "a time such as 2026-01-31T02:00:00+00:00",
}


def require_time(name: str, types: dict[str, ColumnType]) -> None:
    """Check that a column can say when a message's event was.

    Args:
      name: the column.
      types: all columns.

    Raises:
      ValueError: it is not there, or its type cannot.
    """
    if name not in types:
        raise ValueError(f"--event-time must be a column of --schema ({', '.join(types)}), got '{name}'")
    if types[name].kind not in _FORMS:
        raise ValueError(f"--event-time: {name} must be int64, float64 or string, got {types[name].describe()}")


def seconds_of(value: Any, type_: ColumnType) -> float | None:
    """Return the time that a value says, in seconds since 1970; None where it says none."""
    if isinstance(value, datetime):
        return _seconds(value)
    if type_.kind == "string":
        try:
            return _seconds(datetime.fromisoformat(value))
        except (ValueError, TypeError):
            return None
    units = 1000 if type_.kind == "int64" else 1
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _LAST_S * units:
        return None
    return value / units


def refusal(name: str, type_: ColumnType, value: Any) -> str:
    """Say why a value is no time."""
    return f"{name} must be {_FORMS[type_.kind]} (--event-time), got {value!r:.80}"


def _seconds(moment: datetime) -> float | None:
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return seconds if seconds >= 0 else None
