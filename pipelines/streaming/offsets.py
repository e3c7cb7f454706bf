"""Sets of message offsets, kept as closed intervals per partition.

What a dataset has settled of a topic is one interval per partition and a few more where windows are open, however many
messages there were.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class Offsets:
    """A set of offsets of each partition of a topic.

    Args:
      intervals: by partition, pairs of the first and the last offset, in any order, overlapping or not.

    Example:
      >>> seen = Offsets({0: [(0, 4), (5, 9), (12, 12)]})
      >>> seen.first_missing(0, 3), (0, 11) in seen, seen.count
      (10, False, 11)
    """

    def __init__(self, intervals: Mapping[int, Iterable[tuple[int, int]]] | None = None) -> None:
        self._firsts: dict[int, list[int]] = {}
        self._lasts: dict[int, list[int]] = {}
        for partition, pairs in (intervals or {}).items():
            for first, last in pairs:
                self.add(partition, first, last)

    def add(self, partition: int, first: int, last: int) -> None:
        """Add the offsets from `first` to `last`, both included; nothing where `last` is smaller."""
        if last < first:
            return
        firsts, lasts = self._firsts.setdefault(partition, []), self._lasts.setdefault(partition, [])
        start = bisect_left(lasts, first - 1)  # the first interval that touches or follows
        stop = bisect_right(firsts, last + 1)
        if start < stop:
            first, last = min(first, firsts[start]), max(last, lasts[stop - 1])
        firsts[start:stop], lasts[start:stop] = [first], [last]

    def update(self, other: Offsets) -> None:
        """Add all offsets of another set."""
        for partition, first, last in other:
            self.add(partition, first, last)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for partition in sorted(self._firsts):
            for first, last in zip(self._firsts[partition], self._lasts[partition], strict=True):
                yield partition, first, last

    def __contains__(self, place: tuple[int, int]) -> bool:
        partition, offset = place
        lasts = self._lasts.get(partition, [])
        at = bisect_left(lasts, offset)
        return at < len(lasts) and self._firsts[partition][at] <= offset

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Offsets) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it changes

    @property
    def count(self) -> int:
        """Number of offsets of all partitions."""
        return sum(last - first + 1 for _, first, last in self)

    def first_missing(self, partition: int, start: int) -> int:
        """Return the lowest offset from `start` on that is not in the set."""
        lasts = self._lasts.get(partition, [])
        at = bisect_left(lasts, start)
        inside = at < len(lasts) and self._firsts[partition][at] <= start
        return lasts[at] + 1 if inside else start

    def missing(self, partition: int, start: int, stop: int) -> list[tuple[int, int]]:
        """List the intervals of offsets in [start, stop) that are not in the set."""
        found = []
        for _, first, last in (item for item in self if item[0] == partition):
            if last < start or first >= stop:
                continue
            if first > start:
                found.append((start, first - 1))
            start = last + 1
        return [*found, (start, stop - 1)] if start < stop else found

    def to_json(self) -> dict[str, list[list[int]]]:
        """Return the intervals as JSON values, by the partition's number as text."""
        found: dict[str, list[list[int]]] = {}
        for partition, first, last in self:
            found.setdefault(str(partition), []).append([first, last])
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Offsets:
        """Read what `to_json` returned."""
        return cls({int(partition): [(a, b) for a, b in pairs] for partition, pairs in data.items()})
