"""Source files, and the blocks of them that can be read on their own."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

FILES_PER_UNIT = 4096
SUFFIXES = {
    "csv": (".csv", ".tsv"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "tfrecord": (".tfrecord", ".tfrecords", ".tfr"),
    "text": (".txt", ".text"),
    "lm": (".txt", ".text", ".md", ".jsonl", ".ndjson", ".json", ".parquet"),
    "chat": (".jsonl", ".ndjson", ".json", ".parquet"),
    "axolotl": (".jsonl", ".ndjson", ".json", ".parquet"),
    "distillkit": (".parquet", ".arrow"),
    "lists": (".jsonl", ".ndjson", ".json", ".parquet"),
}
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class Source:
    """A file to ingest: its path, its name relative to what was named, size in bytes and time of change in ns."""

    path: str
    name: str
    bytes: int
    mtime_ns: int

    @property
    def compressed(self) -> bool:
        """Whether the file is read through gzip or Zstandard."""
        return self.path.lower().endswith(COMPRESSED)


@dataclass(frozen=True)
class Block:
    """Whole records of a file.

    Attributes:
      source: the file.
      start: first byte.
      stop: the byte after the last, or None for the end of the file.
      first: number of the first record, from 1.
    """

    source: Source
    start: int
    stop: int | None
    first: int


@dataclass(frozen=True)
class SourceUnit:
    """Blocks that a worker takes at once: its number in the order of the sources, and a stable id."""

    number: int
    uid: str
    blocks: tuple[Block, ...]

    def __str__(self) -> str:
        first = self.blocks[0]
        more = f" and {len(self.blocks) - 1} more" if len(self.blocks) > 1 else ""
        return f"{first.source.path} from record {first.first:,}{more}"


def find_sources(paths: Sequence[str], format_: str) -> list[Source]:
    """List the files that paths, directories and glob patterns name, in the order of their names.

    A directory stands for the files in it, at any depth, that end as the format's files do (every file, for images). Names
    that begin with a dot or an underscore are passed over.

    Raises:
      ValueError: a path with nothing at it, or a directory without such files.
    """
    found: dict[str, Source] = {}
    for text in paths:
        path = Path(text)
        files = _below(path, format_) if path.is_dir() else [path] if path.exists() else _matching(text)
        if not files:
            raise ValueError(
                f"SOURCE must name files, directories or glob patterns with {format_}, got {text}: {_nothing(path, format_)}"
            )
        root = path if path.is_dir() else Path(os.path.commonpath([file.parent for file in files]))
        for file in files:
            state = file.stat()
            source = Source(str(file.resolve()), str(file.relative_to(root)), state.st_size, state.st_mtime_ns)
            found.setdefault(source.path, source)
    return sorted(found.values(), key=lambda source: (source.name, source.path))


def plan_source_units(blocks: Iterable[Block], unit_bytes: int) -> list[SourceUnit]:
    """Group consecutive blocks into units of about `unit_bytes`."""
    units: list[SourceUnit] = []
    waiting: list[Block] = []
    size = 0
    for block in blocks:
        block_bytes = (block.source.bytes if block.stop is None else block.stop) - block.start
        if waiting and (size + block_bytes > unit_bytes or len(waiting) == FILES_PER_UNIT):
            units.append(_unit(len(units), waiting))
            waiting, size = [], 0
        waiting.append(block)
        size += block_bytes
    return [*units, _unit(len(units), waiting)] if waiting else units


def _unit(number: int, blocks: list[Block]) -> SourceUnit:
    identity = "\n".join(f"{b.source.path}|{b.source.bytes}|{b.source.mtime_ns}|{b.start}|{b.stop}" for b in blocks)
    uid = hashlib.blake2b(f"{number}\n{identity}".encode(), digest_size=8).hexdigest()
    return SourceUnit(number, uid, tuple(blocks))


def _below(directory: Path, format_: str) -> list[Path]:
    suffixes = SUFFIXES.get(format_)
    return [
        path
        for path in directory.rglob("*")
        if path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(directory).parts)
        and (suffixes is None or path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(suffixes))
    ]


def _matching(pattern: str) -> list[Path]:
    return [path for text in glob.glob(pattern, recursive=True) if (path := Path(text)).is_file()]  # noqa: PTH207  # absolute patterns


def _nothing(path: Path, format_: str) -> str:
    if not path.is_dir():
        return "nothing is there"
    endings = SUFFIXES.get(format_)
    return (
        f"no file in it ends in {', '.join(endings)} (or these with .gz or .zst); name files of other endings one by one"
        if endings
        else "it holds no file"
    )
