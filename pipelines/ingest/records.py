"""Records as they come out of a source, before they have types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

EXCERPT = 200  # characters of a bad record that are kept


@dataclass(frozen=True)
class Bad:
    """A record that cannot be used.

    Attributes:
      file: name of its file.
      line: its line (its number, in files without lines), from 1; None where a file is one record.
      error: what is wrong with it.
      record: the beginning of its text.
    """

    file: str
    line: int | None
    error: str
    record: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return vars(self)


Sink: TypeAlias = Callable[[Bad], None]  # takes the bad records, of which there may be more than memory holds


@dataclass(frozen=True)
class Records:
    """Records of one file whose values are Python's.

    Attributes:
      file: name of the file.
      lines: number of each record.
      columns: values per column.
      contents: a hash of each record before anything is converted.
      bad: what could not be read at all.
    """

    file: str
    lines: Sequence[int]
    columns: Mapping[str, list[Any]]
    contents: Sequence[bytes]
    bad: Sequence[Bad] = field(default=())


def excerpt(data: bytes | str) -> str:
    """Return the beginning of a record as text."""
    text = data if isinstance(data, str) else data[: 4 * EXCERPT].decode(errors="replace")
    return text[: 4 * EXCERPT].rstrip("\r\n")[:EXCERPT]
