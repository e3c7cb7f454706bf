"""CSV (RFC 4180): quoted fields may hold delimiters, doubled quotes and line ends.

Lines without a quote are cut by pyarrow, some hundred megabytes a second. The others go through Python's strict reader one
record at a time: a quote that is never closed costs the line that it stands in, and reading goes on with the next line
instead of swallowing the rest of the file.
"""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from distilbeam.pipelines.ingest.records import Bad, Records, excerpt
from distilbeam.pipelines.ingest.sources import Block, Source, line_chunks

QUOTE = b'"'
_RECORD_LINES = 10_000  # most lines of one record
_RECORDS = 65_536  # records handed on at once


def read_header(source: Source, delimiter: str) -> tuple[tuple[str, ...], int]:
    """Return the names in a file's first line and the number of bytes of that line.

    Raises:
      ValueError: names that are empty or equal, or text that is not UTF-8.
    """
    data = next((data for _, data in line_chunks(Block(source, 0, None, 1), 1 << 16)), b"")
    line, newline, _ = data.partition(b"\n")
    try:
        columns = next(csv.reader([line.decode("utf-8-sig").rstrip("\r")], delimiter=delimiter, strict=True), [])
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{source.name}: the first line must be a header in UTF-8: {e}") from e
    if not columns or not all(columns) or len(set(columns)) < len(columns):
        raise ValueError(
            f"{source.name}: the first line must give every column a name of its own, got {excerpt(line)!r}; "
            "name the columns of files without a header with --columns"
        )
    return tuple(columns), len(line) + len(newline)


def csv_records(block: Block, delimiter: str) -> Iterator[Records]:
    """Read a block of CSV; see the module."""
    chunks = line_chunks(block)
    for line, data in chunks:
        if not _is_plain(data):
            yield from _read_strictly(block, delimiter, chain([(line, data)], chunks))
            return
        yield _read_plain(block, delimiter, line, data)


def is_splittable(data: bytes) -> bool:
    """Tell whether no record goes over more than one of the whole lines of `data`."""
    return QUOTE not in data or all(line.count(QUOTE) % 2 == 0 for line in data.split(b"\n"))


def _is_plain(data: bytes) -> bool:
    """Tell whether a line is a record and a delimiter ends a field, whatever comes before it."""
    if QUOTE in data or data.count(b"\r") != data.count(b"\r\n"):
        return False
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read_plain(block: Block, delimiter: str, first: int, data: bytes) -> Records:
    width = len(block.columns)
    data = data if data.endswith(b"\n") else data + b"\n"
    values = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(values == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])
    marks = np.flatnonzero(values == ord(delimiter))
    fields = np.searchsorted(marks, ends) - np.searchsorted(marks, starts) + 1
    blank = (ends == starts) | ((ends == starts + 1) & (values[starts] == ord("\r")))
    wrong = (fields != width) & ~blank
    good = ~(wrong | blank)
    if not good.all():
        data = b"".join(data[a : b + 1] for a, b in zip(starts[good], ends[good], strict=True))
    bad = [
        Bad(block.source.name, first + int(i), _wrong_width(width, int(fields[i])), excerpt(data_line))
        for i in np.flatnonzero(wrong)
        if (data_line := values[starts[i] : ends[i]].tobytes()) is not None
    ]
    table = _parse_plain(data, block.columns, delimiter)
    columns = {name: table[name].combine_chunks() for name in block.columns}
    return Records(block.source.name, (first + np.flatnonzero(good)).tolist(), columns, bad)


def _parse_plain(data: bytes, columns: Sequence[str], delimiter: str) -> pa.Table:
    schema = pa.schema([(name, pa.string()) for name in columns])
    if not data:
        return schema.empty_table()
    return pacsv.read_csv(
        io.BytesIO(data),
        pacsv.ReadOptions(column_names=list(columns), use_threads=False, block_size=len(data) + 1),
        pacsv.ParseOptions(delimiter=delimiter, quote_char=False),
        pacsv.ConvertOptions(column_types=schema, strings_can_be_null=False),
    )


class _Lines:
    """Lines for the strict reader; those of a record that fails can be taken back."""

    def __init__(self, chunks: Iterator[tuple[int, bytes]]) -> None:
        self._lines = ((first + i, line) for first, data in chunks for i, line in enumerate(data.splitlines(True)))
        self._again: deque[tuple[int, bytes]] = deque()
        self.record: list[tuple[int, bytes]] = []

    def __iter__(self) -> Iterator[str]:
        while True:
            item = self._again.popleft() if self._again else next(self._lines, None)
            if item is None:
                return
            self.record.append(item)
            if len(self.record) > _RECORD_LINES:
                raise csv.Error(f"a quote is not closed within {_RECORD_LINES:,} lines")
            try:
                yield item[1].decode()
            except UnicodeDecodeError as e:
                raise csv.Error(f"the text must be UTF-8: {e}") from e

    def give_up(self) -> tuple[int, bytes]:
        """Take back all lines of the record but the first; return the first."""
        first, *others = self.record
        self._again.extendleft(reversed(others))
        self.record = []
        return first


def _read_strictly(block: Block, delimiter: str, chunks: Iterator[tuple[int, bytes]]) -> Iterator[Records]:
    csv.field_size_limit(2**31 - 1)
    lines, width, name = _Lines(chunks), len(block.columns), block.source.name
    numbers: list[int] = []
    rows: list[list[str]] = []
    bad: list[Bad] = []
    reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    while True:
        lines.record = []
        try:
            fields = next(reader, None)
            error = "" if not fields or len(fields) == width else _wrong_width(width, len(fields))
        except csv.Error as e:
            fields, error = [], f"not CSV: {e}"
        if error:
            number, text = lines.give_up()
            bad.append(Bad(name, number, error, excerpt(text)))
            reader = csv.reader(iter(lines), delimiter=delimiter, strict=True)
        elif fields:
            numbers.append(lines.record[0][0])
            rows.append(fields)
        if fields is None or len(rows) == _RECORDS:
            yield _as_records(block, numbers, rows, bad)
            numbers, rows, bad = [], [], []
        if fields is None:
            return


def _as_records(block: Block, numbers: list[int], rows: list[list[str]], bad: list[Bad]) -> Records:
    values = zip(*rows, strict=True) if rows else [()] * len(block.columns)
    columns = {name: pa.array(cells, pa.string()) for name, cells in zip(block.columns, values, strict=True)}
    return Records(block.source.name, numbers, columns, bad)


def _wrong_width(expected: int, found: int) -> str:
    return f"a record must have {expected} fields, got {found}"
