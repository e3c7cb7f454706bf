"""Work whose item is done when its one file is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FilePerItem(Generic[Item]):
    """The part of `phase.Work` that follows from the name of an item's file."""

    def file(self, item: Item, /) -> Path:
        """Return the file whose presence commits an item."""
        raise NotImplementedError

    def remaining(self, items: Sequence[Item], /) -> list[Item]:
        """Return the items whose file is not committed."""
        return [item for item in items if not self.file(item).exists()]

    def rows(self, _: Item, /) -> int:
        """Count items instead of rows, whose number is not known before they are read."""
        return 1

    def settle(self, _: Sequence[object], /) -> None:
        """Do nothing: the work commits its file itself."""
