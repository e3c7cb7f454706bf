"""CSV files -> the table of records, by DuckDB's reader."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
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
from distilbeam.pipelines.ingest.records_table import RecordsTable, count, id_of
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
    loaded: list[tuple[CsvFile, int, int]] = []  # file, number of its first record, columns of its own
    copies.mkdir(exist_ok=True)
    for header, part in _parts(headers):
        files = _load_part(connection, part, header, names, options, copies, bad)
        loaded += [(file, first, len(header)) for file, first in files]
    firsts = [first for _, first, _ in loaded]

    def places(rows: Sequence[int]) -> list[tuple[str, int | None]]:
        found: list[tuple[str, int | None]] = []
        which = np.searchsorted(firsts, rows, side="right") - 1
        for index, group in groupby(zip(which.tolist(), rows, strict=True), key=lambda pair: pair[0]):
            file, first, width = loaded[index]
            lines = lines_of(file, [row - first for _, row in group], width, options)
            found += [(file.source.name, line) for line in lines]
        return found

    rows = count(connection) if loaded else 0
    return RecordsTable(connection, names, rows, places)


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


def _load_part(
    connection: duckdb.DuckDBPyConnection,
    sources: list[Source],
    header: tuple[str, ...],
    names: tuple[str, ...],
    options: IngestOptions,
    copies: Path,
    bad: Sink,
) -> list[tuple[CsvFile, int]]:
    """Append files to the records; return where the records of each begin."""
    start = len(list(copies.iterdir()))  # a copy stays: lines are looked up in it
    places = [copies / f"{start + i}.csv" for i in range(len(sources))]
    files = [prepared(source, place, options, bad) for source, place in zip(sources, places, strict=True)]
    while strange := _read(connection, files, header, options):
        for i in strange:
            files[i] = mended(files[i].source, places[i], options, bad)
    for file in files:
        if file.damage is not None:
            bad(file.damage)
    _send_rejected(connection, files, len(header), options, bad)
    firsts = dict(run(connection, "SELECT filename, min(rowid) FROM part GROUP BY filename"))
    before = _append_part(connection, header, names) if firsts else 0
    return [(file, before + firsts[file.path]) for file in files if file.path in firsts]


def _append_part(connection: duckdb.DuckDBPyConnection, header: tuple[str, ...], names: tuple[str, ...]) -> int:
    """Append the table `part` to the records; return how many there were."""
    if not run(connection, "SELECT 1 FROM duckdb_tables() WHERE table_name = 'records'"):
        own = [
            f"c{header.index(name)} AS c{i}" if name in header else f"NULL::VARCHAR AS c{i}"
            for i, name in enumerate(names)
        ]
        if header == names:
            run(connection, "ALTER TABLE part RENAME TO records")
        else:
            run(connection, f"CREATE TABLE records AS SELECT {', '.join(own)}, id FROM part")
        return 0
    before = count(connection)
    own = [f"c{header.index(name)}" if name in header else "NULL" for name in names]
    places = ", ".join(f"c{i}" for i in range(len(names)))
    run(connection, f"INSERT INTO records ({places}, id) SELECT {', '.join(own)}, id FROM part")
    return before


def _read(
    connection: duckdb.DuckDBPyConnection, files: list[CsvFile], header: tuple[str, ...], options: IngestOptions
) -> set[int]:
    """Read files into the table `part`; return which of them must be mended, after which it is to be done again."""
    columns = ", ".join(f"c{i}: 'VARCHAR'" for i in range(len(header)))
    line = options.max_record_bytes
    hashed = "NULL::VARCHAR" if options.id_column else id_of({name: f"c{i}" for i, name in enumerate(header)})
    for name in ("part", "reject_errors", "reject_scans"):
        run(connection, f"DROP TABLE IF EXISTS {name}")
    try:
        run(
            connection,
            f"""CREATE TABLE part AS SELECT *, {hashed} AS id FROM read_csv(
            [{", ".join(text(file.path) for file in files)}], columns = {{{columns}}}, filename = true,
            auto_detect = false, header = {not options.columns}, delim = {text(options.delimiter)}, quote = '"',
            escape = '"', nullstr = '', strict_mode = true, max_line_size = {line}, buffer_size = {max(2 * line, 2**25)},
            store_rejects = true, rejects_limit = 0) {"WHERE c0 IS NOT NULL" if len(header) == 1 else ""}""",
        )
    except duckdb.InvalidInputException:  # line ends of several kinds; which file has them is not said
        whole = [i for i, file in enumerate(files) if file.lines is None]
        if not whole:
            raise
        return set(whole)
    known = ", ".join(map(text, (*_WIDTHS, _ENCODING)))  # what else there is hides other records: quotes not closed
    rows = run(connection, f"SELECT DISTINCT file_path FROM {_REJECTED} WHERE error_type NOT IN ({known})")
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
