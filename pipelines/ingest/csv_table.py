"""CSV files -> the table of records, by DuckDB's reader."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import duckdb
import numpy as np

from distilbeam.pipelines.ingest.csv_files import (
    CsvFile,
    line_numbers,
    lines_of,
    mended,
    prepared,
    read_header,
    wrong_width,
)
from distilbeam.pipelines.ingest.database import run, streamed, text
from distilbeam.pipelines.ingest.lines import NOT_TEXT
from distilbeam.pipelines.ingest.records import Bad, Sink, excerpt
from distilbeam.pipelines.ingest.records_table import RecordsTable, count
from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.pipelines.ingest.sources import Source

_PART_BYTES = 2**30  # of files that are read by one statement; copies of them are on the disk until it ends
_AT_ONCE = 100_000  # bad records whose lines are looked up at once
_WIDTHS, _ENCODING = ("MISSING COLUMNS", "TOO MANY COLUMNS"), "INVALID ENCODING"
_REJECTED = "reject_errors JOIN reject_scans USING (scan_id, file_id)"


def load_csv(
    connection: duckdb.DuckDBPyConnection, sources: Sequence[Source], options: IngestOptions, copies: Path, bad: Sink
) -> RecordsTable:
    """Load files, columns by their names; a column that a file does not have is missing in its records.

    Args:
      connection: a database without tables.
      sources: the files.
      options: how they are read.
      copies: a directory for copies of files.
      bad: takes the bad records.

    Raises:
      ValueError: headers that cannot be, or that have nothing in common.
    """
    headers = {source: read_header(source, options) for source in sources if source.bytes}
    names = _all_names(headers)
    columns = ", ".join([*(f"c{i} VARCHAR" for i in range(len(names))), "file INTEGER"])
    run(connection, f"CREATE TEMP TABLE records ({columns})")
    copies.mkdir(exist_ok=True)
    files: list[CsvFile] = []
    for header, part in _parts(headers):
        # a copy stays: lines are looked up in it
        places = [copies / f"{len(files) + i}.csv" for i in range(len(part))]
        here = [prepared(source, place, options, bad) for source, place in zip(part, places, strict=True)]
        while strange := _append(connection, here, len(files), header, names, options):
            for i in strange:
                here[i] = mended(here[i].source, places[i], options, bad)
        for damage in (file.damage for file in here if file.damage is not None):
            bad(damage)
        _send_rejected(connection, here, len(header), options, bad)
        files += here
    firsts = dict(run(connection, "SELECT file, min(rowid) FROM records GROUP BY file ORDER BY file"))
    widths = [len(headers[file.source]) for file in files]
    return RecordsTable(connection, names, count(connection), partial(_places, files, firsts, widths, options))


def _places(
    files: Sequence[CsvFile], firsts: dict[int, int], widths: Sequence[int], options: IngestOptions, rows: Sequence[int]
) -> list[tuple[str, int | None]]:
    """Find file and line of records; `firsts` has the number of the first record of each file that has one."""
    found: list[tuple[str, int | None]] = []
    which = np.searchsorted(list(firsts.values()), rows, side="right") - 1
    for index, group in groupby(zip(which.tolist(), rows, strict=True), key=lambda pair: pair[0]):
        file, first = list(firsts.items())[index]
        lines = lines_of(files[file], [row - first for _, row in group], widths[file], options)
        found += [(files[file].source.name, line) for line in lines]
    return found


def _all_names(headers: dict[Source, tuple[str, ...]]) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for source, header in headers.items():
        if names and header and not names.keys() & set(header):
            first = next(iter(headers))
            raise ValueError(
                f"{source.name} has no column of {first.name} ({', '.join(headers[first])}), its first line is "
                f"{', '.join(header)}; ingest them into pools of their own, or name the columns of files without a "
                "header with --columns"
            )
        names |= dict.fromkeys(header)
    return tuple(names)


def _parts(headers: dict[Source, tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], list[Source]]]:
    """Group files that follow one another and have the same header."""
    for header, group in groupby(headers, key=headers.__getitem__):
        waiting: list[Source] = []
        for source in group if header else ():
            if waiting and sum(each.bytes for each in waiting) + source.bytes > _PART_BYTES:
                yield header, waiting
                waiting = []
            waiting.append(source)
        if waiting:
            yield header, waiting


def _append(
    connection: duckdb.DuckDBPyConnection,
    files: list[CsvFile],
    before: int,
    header: tuple[str, ...],
    names: tuple[str, ...],
    options: IngestOptions,
) -> set[int]:
    """Append the records of files; return which files must be mended first, of which nothing was appended then."""
    columns = ", ".join(f"c{i}: 'VARCHAR'" for i in range(len(header)))
    places = {name: f"c{i}" for i, name in enumerate(header)}
    own = ", ".join(places.get(name, "NULL") for name in names)
    line = options.max_record_bytes
    for name in ("reject_errors", "reject_scans"):
        run(connection, f"DROP TABLE IF EXISTS {name}")
    run(connection, "BEGIN")
    try:
        run(
            connection,
            f"""INSERT INTO records SELECT {own}, {before} + file_index FROM read_csv(
            [{", ".join(text(file.path) for file in files)}], columns = {{{columns}}},
            auto_detect = false, header = {not options.columns}, delim = {text(options.delimiter)}, quote = '"',
            escape = '"', nullstr = '', strict_mode = true, max_line_size = {line}, buffer_size = {max(2 * line, 2**25)},
            store_rejects = true, rejects_limit = 0) {"WHERE c0 IS NOT NULL" if len(header) == 1 else ""}""",
        )
    except duckdb.InvalidInputException:  # line ends of several kinds; which file has them is not said
        run(connection, "ROLLBACK")
        whole = [i for i, file in enumerate(files) if file.lines is None]
        if not whole:
            raise
        return set(whole)
    known = ", ".join(map(text, (*_WIDTHS, _ENCODING)))  # what else there is hides other records: quotes not closed
    rows = run(connection, f"SELECT DISTINCT file_path FROM {_REJECTED} WHERE error_type NOT IN ({known})")
    run(connection, "ROLLBACK" if rows else "COMMIT")
    return {i for i, file in enumerate(files) if (file.path,) in rows}


def _send_rejected(
    connection: duckdb.DuckDBPyConnection, files: list[CsvFile], width: int, options: IngestOptions, bad: Sink
) -> None:
    """Say what DuckDB refused to take of the latest files."""
    names = {file.path: file for file in files}
    rows = streamed(
        connection,
        f"""SELECT file_path, line_byte_position, first(error_type ORDER BY byte_position), first(csv_line)
        FROM {_REJECTED} GROUP BY ALL ORDER BY ALL""",
    )
    for path, group in groupby(rows, key=lambda row: row[0]):
        while found := list(islice(group, _AT_ONCE)):
            lines = line_numbers(names[path], np.array([row[1] for row in found]) - 1)  # DuckDB counts from 1
            for number, (_, _, kind, line) in zip(lines, found, strict=True):
                error = wrong_width(width, _fields(line, options)) if kind in _WIDTHS else NOT_TEXT
                bad(Bad(names[path].source.name, number, error, excerpt(line.lstrip("\r\n"))))


def _fields(record: str, options: IngestOptions) -> int:
    return len(next(csv.reader(record.lstrip("\r\n").splitlines(True), delimiter=options.delimiter), []))
