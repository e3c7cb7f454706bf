"""Work whose item is done when its one file is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from distilbeam.pipelines.ingest.settings import IngestOptions


class Named(Protocol):
    """An item with a stable id, which is named by `str` in errors."""

    @property
    def uid(self) -> str:
        """The id: the name of its file."""


Item = TypeVar("Item", bound=Named)


@dataclass(frozen=True)
class FilePerItem(Generic[Item]):
    """The part of `phase.Work` that follows from the name of an item's file.

    Attributes:
      options: how sources are read.
      output: directory of the items' files.
    """

    options: IngestOptions
    output: str

    def file(self, item: Item, /) -> Path:
        """Return the file whose presence commits an item."""
        return Path(self.output) / f"{item.uid}.json"

    def name(self, item: Item, /) -> str:
        """Name an item for errors."""
        return str(item)

    def remaining(self, items: Sequence[Item], /) -> list[Item]:
        """Return the items whose file is not committed."""
        return [item for item in items if not self.file(item).exists()]

    def rows(self, _: Item, /) -> int:
        """Count items instead of rows, whose number is not known before they are read."""
        return 1

    def settle(self, _: Sequence[object], /) -> None:
        """Do nothing: the work commits its file itself."""
