"""CSV files (RFC 4180) in a form that DuckDB's reader and Python's strict one read alike.

DuckDB reads most files as they are. It gets a copy of one that is compressed, and a mended copy, with Python's reader, of
one that the two would read differently: with a quote that is never closed (DuckDB passes over the records around it), blanks
beside quotes (DuckDB drops them), line ends of several kinds. A quote that is never closed costs the line that it stands in.

Both readers pass over blank lines, and over empty fields behind the last column.
"""

from __future__ import annotations

import csv
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distilbeam.pipelines.ingest.lines import DAMAGES, damage, good_lines, has_mark, is_utf8, read_lines, read_pieces
from distilbeam.pipelines.ingest.records import Bad, Sink, excerpt
from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.pipelines.ingest.sources import Source

_HEADER_BYTES = 2**20
_PIECE_BYTES = 2**23
_RECORD_LINES = 10_000  # most lines of one record
_GLOB = set("*?[]{}")  # DuckDB takes a name with one of these for a pattern


@dataclass(frozen=True)
class CsvFile:
    """A file for DuckDB to read.

    Attributes:
      source: the file that it is, or is a copy of.
      path: where it is.
      lines: the source's line of each record of a mended copy.
      damage: where the source's rest is lost, says so.
    """

    source: Source
    path: str
    lines: Sequence[int] | None = None
    damage: Bad | None = None


def read_header(source: Source, options: IngestOptions) -> tuple[str, ...]:
    """Return the names in a file's first line, or those that the options give; none where the file is empty.

    Raises:
      ValueError: names that are empty or equal, or text that is not UTF-8.
    """
    if options.columns:
        return options.columns
    try:
        data = next(read_pieces(source), b"")
    except DAMAGES as e:
        raise ValueError(f"{source.name}: the header cannot be read: {e}") from e
    line = data[:_HEADER_BYTES].partition(b"\n")[0]
    if not data:
        return ()
    try:
        columns = next(csv.reader([line.decode().rstrip("\r")], delimiter=options.delimiter, strict=True), [])
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{source.name}: the first line must be a header in UTF-8: {e}") from e
    if not columns or not all(columns) or len(set(columns)) < len(columns):
        raise ValueError(
            f"{source.name}: the first line must give every column a name of its own, got {excerpt(line)!r}; "
            "name the columns of files without a header with --columns"
        )
    return tuple(columns)


def prepared(source: Source, copy: Path, options: IngestOptions, bad: Sink) -> CsvFile:
    """Return a file as it is where both readers would agree on it, else a copy; see the module.

    Args:
      source: the file.
      copy: where a copy is written.
      options: how the source is read.
      bad: takes what a copy no longer shows.
    """
    copied = source.compressed or bool(_GLOB & set(source.path)) or has_mark(source)
    if not copied and _is_plain(source):
        return CsvFile(source, source.path)
    lost = None
    with copy.open("wb") as out:
        try:
            for lines in read_lines(source, options.max_record_bytes):
                if lines.bad or _is_strange(lines.data, options.delimiter):
                    return mended(source, copy, options, bad)
                if copied:
                    out.write(lines.data)
        except DAMAGES as e:
            lost = damage(source, e)
    return CsvFile(source, str(copy) if copied else source.path, damage=lost)


def mended(source: Source, copy: Path, options: IngestOptions, bad: Sink) -> CsvFile:
    """Copy the records of a file that Python's strict reader accepts, every field in quotes."""
    lines = _TextLines(source, options.max_record_bytes, bad)
    width = len(read_header(source, options))
    numbers = array("q")
    with copy.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, delimiter=options.delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n")
        for number, fields in _records(lines, width, options.delimiter, bad):
            writer.writerow(fields)
            numbers.append(number)
    return CsvFile(source, str(copy), numbers if options.columns else numbers[1:])


def lines_of(file: CsvFile, rows: Sequence[int], width: int, options: IngestOptions) -> list[int]:
    """Return the lines that records begin in.

    Args:
      file: the file.
      rows: places of the records among those that DuckDB accepted, ascending.
      width: number of columns.
      options: how the file is read.
    """
    if file.lines is not None:
        return [file.lines[row] for row in rows]
    wanted, found, row = deque(rows), list[int](), 0 if options.columns else -1
    with Path(file.path).open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as text:
        reader, before = csv.reader(text, delimiter=options.delimiter), 0
        for fields in reader:
            if wanted and row == wanted[0] and _fits(fields, width) and not _is_damaged(fields):
                found.append(before + 1)
                wanted.popleft()
            row += _fits(fields, width) and not _is_damaged(fields)
            before = reader.line_num
    return found


def line_numbers(file: CsvFile, positions: npt.NDArray[np.int64]) -> list[int]:
    """Return the lines that records begin in, given positions there or among the line ends before."""
    if not len(positions):
        return []
    data = np.memmap(file.path, np.uint8, "r")
    ends = np.concatenate(
        [at + np.flatnonzero(data[at : at + 2**24] == ord("\n")) for at in range(0, len(data), 2**24)]
    )
    starts = [int(at) + len(_blank(data[at : at + 4096].tobytes())) for at in positions.tolist()]
    return [int(line) + 1 for line in np.searchsorted(ends, starts)]


def wrong_width(expected: int, found: int) -> str:
    """Say that a record has the wrong number of fields."""
    return f"a record must have {expected} fields, got {found}"


def _blank(data: bytes) -> bytes:
    return data[: len(data) - len(data.lstrip(b"\r\n"))]


def _is_plain(source: Source) -> bool:
    """Tell whether a file has neither quotes nor carriage returns, so that there is nothing to differ about."""
    with Path(source.path).open("rb") as file:
        return all(b'"' not in data and b"\r" not in data for data in iter(lambda: file.read(_PIECE_BYTES), b""))


def _is_strange(data: bytes, delimiter: str) -> bool:
    """Tell whether the two readers may differ; cheap, and more often wrong about a quote inside a field than needed."""
    if b"\r" in data and data.count(b"\r") != data.count(b"\r\n"):
        return True
    if b' "' not in data and b'" ' not in data:
        return False
    letters = np.frombuffer(data, np.uint8)
    ends = [*delimiter.encode(), *b"\r\n"]
    quotes = np.flatnonzero(letters == ord('"'))
    for step in (-1, 1):  # blanks before a quote, and behind one: do they reach to where the field ends?
        at = quotes + step
        while len(at):
            inside = at[(at >= 0) & (at < len(letters))]
            blank = inside[letters[inside] == ord(" ")]
            passed = blank + step
            if ((passed < 0) | (passed == len(letters))).any():
                return True
            if np.isin(letters[passed], ends).any():
                return True
            at = passed
    return False


class _TextLines:
    """Lines for the strict reader; those of a record that fails can be taken back."""

    def __init__(self, source: Source, limit: int, bad: Sink) -> None:
        self.name = source.name
        self._lines = _numbered(source, limit, bad)
        self._again: deque[tuple[int, str]] = deque()
        self.record: list[tuple[int, str]] = []

    def __iter__(self) -> Iterator[str]:
        while True:
            item = self._again.popleft() if self._again else next(self._lines, None)
            if item is None:
                return
            self.record.append(item)
            if len(self.record) > _RECORD_LINES:
                raise csv.Error(f"a quote is not closed within {_RECORD_LINES:,} lines")
            yield item[1]

    def give_up(self) -> tuple[int, str]:
        """Take back all lines of the record but the first; return the first."""
        first, *others = self.record
        self._again.extendleft(reversed(others))
        self.record = []
        return first


def _numbered(source: Source, limit: int, bad: Sink) -> Iterator[tuple[int, str]]:
    try:
        for lines in read_lines(source, limit):
            numbers, texts = good_lines(source.name, lines, limit, bad)
            yield from zip(numbers.tolist(), texts.to_pylist(), strict=True)
    except DAMAGES as e:
        bad(damage(source, e))


def _records(lines: _TextLines, width: int, delimiter: str, bad: Sink) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    while True:
        lines.record = []
        try:
            fields = next(reader, None)
        except csv.Error as e:
            number, line = lines.give_up()
            bad(Bad(lines.name, number, f"not CSV: {e}", excerpt(line)))
            reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
            continue
        if fields is None:
            return
        if _fits(fields, width):
            yield lines.record[0][0], fields[:width]
        elif not _is_blank(fields, width):
            number, line = lines.record[0]
            bad(Bad(lines.name, number, wrong_width(width, len(fields)), excerpt(line)))


def _is_blank(fields: list[str], width: int) -> bool:
    return not fields or (width == 1 and not any(fields))


def _fits(fields: list[str], width: int) -> bool:
    return len(fields) >= width and not any(fields[width:]) and not _is_blank(fields, width)


def _is_damaged(fields: list[str]) -> bool:
    return any(not is_utf8(field.encode("utf-8", "surrogateescape")) for field in fields if not field.isascii())
