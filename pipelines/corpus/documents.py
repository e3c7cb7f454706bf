"""The documents of source files, read as streams: text files, JSON lines, columns of Parquet.

A text file is one document, and comes in pieces of about a mebibyte that end at line ends, so that a file larger than memory is
read, too: at such an end two tokens may stand where the whole text would have one. A line of JSON or a row of Parquet
is one document each.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.corpus.settings import CorpusOptions
from distilbeam.pipelines.ingest.sources import COMPRESSED, Source

PIECE_BYTES = 2**20
_PARQUET_ROWS = 1024
_JSON = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Document:
    """A text, or a piece of one, or a conversation.

    Attributes:
      value: text, or a list of messages with `role` and `content`.
      record: number of the line or row, from 1.
      begins: whether it is the first piece of its text.
      ends: whether it is the last.
    """

    value: Any
    record: int
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True)
class BadRecord:
    """A record that is no document: its number and why."""

    record: int
    error: str


def read_documents(source: Source, options: CorpusOptions) -> Iterator[Document | BadRecord]:
    """Read the documents of a file.

    Args:
      source: the file; .gz and .zst are unpacked.
      options: the format, and the column of JSON lines and Parquet.

    Yields:
      Documents in the file's order, and records that are none.

    Raises:
      ValueError: a conversation's file is text, the column is not there, or a file is damaged.
    """
    name = source.path.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    try:
        if name.endswith(".parquet"):
            yield from _parquet(source, options)
        elif name.endswith(_JSON):
            yield from _json_lines(source, options)
        elif options.format == "chat":
            raise ValueError(
                f"SOURCE: {source.path} must be JSON lines or Parquet for --format chat, with a column {options.column_read} of "
                "messages"
            )
        else:
            yield from _text(source)
    except (OSError, pa.ArrowException) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ValueError(f"SOURCE: {source.path} cannot be read ({reason}); write it again or leave it out") from e


def _opened(source: Source) -> Any:
    return pa.input_stream(source.path, compression="detect", buffer_size=PIECE_BYTES)


def _text(source: Source) -> Iterator[Document | BadRecord]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    waiting, begins = "", True
    with _opened(source) as stream:
        while data := stream.read(PIECE_BYTES):
            try:
                waiting += decoder.decode(data)
            except UnicodeDecodeError as e:
                yield BadRecord(
                    1, f"the text must be UTF-8, {e.reason} at byte {e.start:,} of a piece; the rest is left out"
                )
                break
            if len(waiting) < PIECE_BYTES:
                continue
            cut = waiting.rfind("\n") + 1 or len(waiting)
            yield Document(waiting[:cut], 1, begins, ends=False)
            waiting, begins = waiting[cut:], False
    if waiting or not begins:
        yield Document(waiting, 1, begins, ends=True)


def _json_lines(source: Source, options: CorpusOptions) -> Iterator[Document | BadRecord]:
    limit, column, record = options.max_record_bytes, options.column_read, 0
    with io.BufferedReader(_opened(source), PIECE_BYTES) as lines:
        while line := lines.readline(limit + 1):
            record += 1
            if len(line) > limit and not line.endswith(b"\n"):
                while (rest := lines.readline(limit)) and not rest.endswith(b"\n"):
                    pass
                yield BadRecord(record, f"the line has more than max_record_bytes = {limit:,} bytes")
            elif line.strip():
                yield _of_json(line, record, column, options.format)


def _of_json(line: bytes, record: int, column: str, format_: str) -> Document | BadRecord:
    try:
        found = json.loads(line)
    except ValueError as e:
        return BadRecord(record, f"the line is not JSON: {e}")
    if not isinstance(found, dict) or column not in found:
        return BadRecord(record, f"the record must be an object with {column!r}; --column names another")
    return _document(found[column], record, column, format_)


def _parquet(source: Source, options: CorpusOptions) -> Iterator[Document | BadRecord]:
    column, record = options.column_read, 0
    with pq.ParquetFile(Path(source.path), page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise ValueError(
                f"SOURCE: {source.path} has no column {column}, its columns are {', '.join(names)}; --column names another"
            )
        for batch in file.iter_batches(_PARQUET_ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                record += 1
                yield _document(value, record, column, options.format)


def _document(value: Any, record: int, column: str, format_: str) -> Document | BadRecord:
    if format_ == "lm":
        if isinstance(value, str):
            return Document(value, record)
        return BadRecord(record, f"{column} must be text, got {type(value).__name__}")
    if isinstance(value, list) and value and all(isinstance(one, dict) and "role" in one for one in value):
        return Document(value, record)
    return BadRecord(record, f"{column} must be a list of messages with 'role' and 'content', got {str(value)[:60]!r}")
