"""Index: cut files into blocks that can be read on their own.

Files of lines are cut behind line ends, CSV only where no record goes over several lines, TFRecord files behind records. A
compressed file is one block, since it can only be read from its beginning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distilbeam.pipelines.files import read_json, write_json
from distilbeam.pipelines.ingest.committing import FilePerItem
from distilbeam.pipelines.ingest.csv_records import is_splittable, read_header
from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.pipelines.ingest.sources import Block, Source, line_chunks
from distilbeam.pipelines.ingest.tfrecord import record_starts


@dataclass(frozen=True)
class SourceGroup:
    """Files that a worker indexes at once."""

    number: int
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Index(FilePerItem[SourceGroup]):
    """The work of the index phase: one JSON file per group.

    Attributes:
      options: how sources are read.
      output: directory of the indexes.
    """

    options: IngestOptions
    output: str

    def __call__(self, group: SourceGroup) -> None:
        """Index the group's files."""
        blocks = [asdict(block) for source in group.sources for block in self._blocks(source)]
        write_json(self.file(group), blocks)

    def name(self, group: SourceGroup) -> str:
        """Name the group by its first file."""
        return f"{len(group.sources)} file(s) from {group.sources[0].path}"

    def read(self, group: SourceGroup) -> list[Block]:
        """Read the group's blocks."""
        return [_block(data) for data in read_json(self.file(group))]

    def file(self, group: SourceGroup) -> Path:
        """Return the file that commits the item."""
        return Path(self.output) / f"{group.number:06d}.json"

    def _blocks(self, source: Source) -> Iterator[Block]:
        if source.bytes == 0:
            return
        columns, start, first = self.options.columns, 0, 1
        if self.options.format == "csv" and not columns:
            columns, start = read_header(source, self.options.delimiter)
            first = 2
        whole = Block(source, start, None, first, columns)
        if source.compressed or self.options.format == "images" or source.bytes - start <= self.options.unit_bytes:
            yield whole
        elif self.options.format == "tfrecord":
            yield from _cut_records(whole, self.options.unit_bytes)
        else:
            yield from _cut_lines(whole, self.options)


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


def _cut_lines(whole: Block, options: IngestOptions) -> Iterator[Block]:
    cuts = [(whole.start, whole.first)]
    at = whole.start
    for line, data in line_chunks(whole, min(options.unit_bytes, 8 * 2**20)):
        if options.format == "csv" and not is_splittable(data):
            yield whole
            return
        if at - cuts[-1][0] >= options.unit_bytes:
            cuts.append((at, line))
        at += len(data)
    yield from _between(whole, cuts)


def _cut_records(whole: Block, unit_bytes: int) -> Iterator[Block]:
    cuts = [(whole.start, whole.first)]
    with Path(whole.source.path).open("rb") as file:
        for number, start in enumerate(record_starts(file), whole.first):
            if start - cuts[-1][0] >= unit_bytes:
                cuts.append((start, number))
    yield from _between(whole, cuts)


def _between(whole: Block, cuts: list[tuple[int, int]]) -> Iterator[Block]:
    ends = [*(start for start, _ in cuts[1:]), None]
    for (start, first), stop in zip(cuts, ends, strict=True):
        yield Block(whole.source, start, stop, first, whole.columns)


def _block(data: dict[str, Any]) -> Block:
    return Block(**{**data, "source": Source(**data["source"]), "columns": tuple(data["columns"])})
