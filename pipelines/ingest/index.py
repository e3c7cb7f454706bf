"""Index: cut TFRecord files into blocks that can be read on their own, behind records.

A compressed file is one block, since it can only be read from its beginning; an image is one, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distilbeam.pipelines.ingest.committing import FilePerItem
from distilbeam.pipelines.ingest.sources import Block, Source
from distilbeam.pipelines.ingest.tfrecord import record_starts
from distilbeam.storage.files import read_json, write_json


@dataclass(frozen=True)
class SourceGroup:
    """Files that a worker indexes at once."""

    number: int
    sources: tuple[Source, ...]

    @property
    def uid(self) -> str:
        """Its number."""
        return f"{self.number:06d}"

    def __str__(self) -> str:
        return f"{len(self.sources)} file(s) from {self.sources[0].path}"


class Index(FilePerItem[SourceGroup]):
    """The work of the index phase: one JSON file per group."""

    def __call__(self, group: SourceGroup) -> None:
        """Index the group's files."""
        blocks = [asdict(block) for source in group.sources for block in self._blocks(source)]
        write_json(self.file(group), blocks)

    def read(self, group: SourceGroup) -> list[Block]:
        """Read the group's blocks."""
        return [_block(data) for data in read_json(self.file(group))]

    def _blocks(self, source: Source) -> Iterator[Block]:
        whole = Block(source, 0, None, 1)
        if self.options.format == "images":
            yield whole  # an empty one is a bad record, too
        elif source.compressed or source.bytes <= self.options.unit_bytes:
            yield from [whole] if source.bytes else []
        else:
            yield from _cut_records(whole, self.options.unit_bytes)


def group_sources(sources: Sequence[Source], group_bytes: int, most: int = 1024) -> list[SourceGroup]:
    """Group files so that one worker does not get many large ones and no item is tiny."""
    groups: list[SourceGroup] = []
    waiting: list[Source] = []
    for source in sources:
        if waiting and (len(waiting) == most or sum(s.bytes for s in waiting) + source.bytes > group_bytes):
            groups.append(SourceGroup(len(groups), tuple(waiting)))
            waiting = []
        waiting.append(source)
    return [*groups, SourceGroup(len(groups), tuple(waiting))] if waiting else groups


def _cut_records(whole: Block, unit_bytes: int) -> Iterator[Block]:
    cuts = [(whole.start, whole.first)]
    with Path(whole.source.path).open("rb") as file:
        for number, start in enumerate(record_starts(file), whole.first):
            if start - cuts[-1][0] >= unit_bytes:
                cuts.append((start, number))
    ends = [*(start for start, _ in cuts[1:]), None]
    for (start, first), stop in zip(cuts, ends, strict=True):
        yield Block(whole.source, start, stop, first)


def _block(data: dict[str, Any]) -> Block:
    return Block(**{**data, "source": Source(**data["source"])})
