"""Records as they come out of a source, before they have types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa

EXCERPT = 200  # characters of a bad record that are kept

Values: TypeAlias = "pa.Array | list[Any]"  # a string array where the source has only text, else Python values


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


@dataclass(frozen=True)
class Records:
    """Records of one file.

    Attributes:
      file: name of the file.
      lines: line (or number) of each record.
      columns: values per column; text as a string array (empty text is a missing value), others as Python values.
      bad: what could not be read at all.
    """

    file: str
    lines: Sequence[int]
    columns: Mapping[str, Values]
    bad: Sequence[Bad] = field(default=())


def excerpt(data: bytes | str) -> str:
    """Return the beginning of a record as text."""
    text = data if isinstance(data, str) else data[: 4 * EXCERPT].decode(errors="replace")
    return text.rstrip("\r\n")[:EXCERPT]
