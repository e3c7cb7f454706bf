"""Text files as numbered lines of UTF-8: decompressed, byte-order marks taken off, what is damaged told apart.

A line ends with a line feed and nowhere else; a carriage return before it belongs to the end. Memory is bounded by the
longest line that is allowed, whatever a file unpacks to.
"""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.pipelines.ingest.records import Bad, Sink, excerpt
from distilbeam.pipelines.ingest.sources import Source

_PIECE_BYTES = 8 * 2**20
_UNPACKED_BYTES = 2**18  # at once: what stands before a damage is not lost with it
_UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
NOT_TEXT = "the text must be UTF-8"


@dataclass(frozen=True)
class Lines:
    """Whole lines that follow one another in a file.

    Attributes:
      first: number of the first line, from 1.
      data: the lines; the last one of a file may have no line end.
      bad: lines before these that are too long to be held.
    """

    first: int
    data: bytes
    bad: list[Bad] = field(default_factory=list)


def read_lines(source: Source, limit: int) -> Iterator[Lines]:
    """Read a file of lines in pieces.

    Args:
      source: the file.
      limit: bytes of the longest line that is held; a longer one may still be in a piece, but only a little longer.

    Yields:
      The lines in their order.

    Raises:
      EOFError, zlib.error, gzip.BadGzipFile, OSError: a compressed file is damaged; the lines before it were yielded.
    """
    line, bad = 1, list[Bad]()
    waiting: list[bytes] = []  # the beginning of a line whose end has not been read
    skipping = False
    for piece in read_pieces(source):
        if skipping:
            _, end, piece = piece.partition(b"\n")
            if not end:
                continue
            skipping, line = False, line + 1
        whole, end, tail = piece.rpartition(b"\n")
        if end:
            data = b"".join([*waiting, whole, end])
            yield Lines(line, data, bad)
            line, waiting, bad = line + data.count(b"\n"), [], []
        if tail:
            waiting.append(tail)
        if sum(map(len, waiting)) > max(limit, _PIECE_BYTES):
            bad.append(Bad(source.name, line, too_long(limit), excerpt(waiting[0])))
            waiting, skipping = [], True
    if waiting or bad:
        yield Lines(line, b"".join(waiting), bad)


def read_pieces(source: Source) -> Iterator[bytes]:
    """Read a file as UTF-8, without compression and byte-order mark; text that is not is passed on as it is."""
    with open_source(source) as file:
        size = _UNPACKED_BYTES if source.compressed else _PIECE_BYTES
        piece = _read(file, size)
        encoding = _UTF16.get(piece[:2])
        if encoding is None:
            yield piece.removeprefix(codecs.BOM_UTF8)
            while piece := _read(file, size):
                yield piece
            return
        decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        piece = piece[2:]
        while piece:
            yield decoder.decode(piece).encode("utf-8", "surrogatepass")
            piece = _read(file, size)


def has_mark(source: Source) -> bool:
    """Tell whether a file that is not compressed begins with a byte-order mark."""
    with Path(source.path).open("rb") as file:
        return file.read(3).startswith((codecs.BOM_UTF8, *_UTF16))


def open_source(source: Source) -> IO[bytes] | gzip.GzipFile | Any:
    """Open a file to read, through gzip or Zstandard where its name says so."""
    if source.path.lower().endswith(".gz"):
        return gzip.open(source.path, "rb")
    if source.path.lower().endswith(".zst"):
        return pa.CompressedInputStream(pa.OSFile(source.path), "zstd")
    return Path(source.path).open("rb")


DAMAGES = (EOFError, gzip.BadGzipFile, zlib.error, OSError)


def damage(source: Source, error: Exception) -> Bad:
    """Say that the rest of a compressed file is lost.

    Raises:
      Exception: the error itself, where the file is not compressed: a disk fails, and nothing is known of the rest.
    """
    if not source.compressed:
        raise error
    return Bad(source.name, None, f"the file is damaged, what follows in it cannot be read: {error}")


def line_ends(data: bytes) -> npt.NDArray[np.int64]:
    """Return where lines end: the positions behind the line feeds, and the end of a last line without one."""
    ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
    return ends if data.endswith(b"\n") or not data else np.append(ends, len(data))


def good_lines(name: str, lines: Lines, limit: int, bad: Sink) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """Part lines into text and bad ones.

    Args:
      name: of the file.
      lines: the lines.
      limit: bytes of the longest line that is allowed.
      bad: takes the bad ones.

    Returns:
      Number [n] and text [n] of each good line, with its line end.
    """
    for wrong in lines.bad:
        bad(wrong)
    ends = line_ends(lines.data)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    numbers = lines.first + np.arange(len(ends))
    if (len(ends) == 0 or int((ends - starts).max()) <= limit) and is_utf8(lines.data):
        offsets = np.concatenate([[0], ends]).astype(np.int64)
        buffers = pa.py_buffer(np.ascontiguousarray(offsets)), pa.py_buffer(lines.data)
        return numbers, pa.LargeStringArray.from_buffers(len(ends), *buffers)
    kept: list[int] = []
    texts: list[str] = []
    for number, start, end in zip(numbers.tolist(), starts.tolist(), ends.tolist(), strict=True):
        data = lines.data[start:end]
        try:
            if len(data) > limit:
                raise ValueError(too_long(limit))
            texts.append(data.decode())
        except ValueError as e:
            error = f"{NOT_TEXT}: {e}" if isinstance(e, UnicodeDecodeError) else str(e)
            bad(Bad(name, number, error, excerpt(data)))
        else:
            kept.append(number)
    return np.array(kept, np.int64), pa.array(texts, pa.large_string())


def is_utf8(data: bytes) -> bool:
    """Tell whether data is text in UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def too_long(limit: int) -> str:
    """Say that a record is longer than the limit."""
    return f"a record must have at most {limit:,} bytes (--max-record-bytes)"


def _read(file: Any, size: int) -> bytes:
    """Read at most `size` bytes, at once where a damage follows them."""
    return bytes(file.read1(size) if isinstance(file, gzip.GzipFile) else file.read(size))
