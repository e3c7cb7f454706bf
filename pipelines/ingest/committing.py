"""Work whose item is done when its one file is there."""

from __future__ import annotations

from pathlib import Path
from typing import Generic, TypeVar

Item = TypeVar("Item", contravariant=True)


class FilePerItem(Generic[Item]):
    """The part of `phases.Work` that follows from the name of an item's file."""

    def file(self, item: Item, /) -> Path:
        """Return the file whose presence commits an item."""
        raise NotImplementedError

    def done(self, item: Item, /) -> bool:
        """Tell whether the item's file is committed."""
        return self.file(item).exists()

    def rows(self, item: Item, /) -> tuple[int, int]:
        """Count items instead of rows, whose number is not known before they are read."""
        return int(self.done(item)), 1
