"""Text and JSON lines -> the table of records, by DuckDB's functions for JSON.

A field of a JSON line is kept as its JSON text, so that 1, 1.0 and "1" are three things; a field that a line does not have
is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distilbeam.pipelines.ingest.database import run, streamed, text
from distilbeam.pipelines.ingest.lines import DAMAGES, damage, good_lines, read_lines
from distilbeam.pipelines.ingest.records import Bad, Sink, excerpt
from distilbeam.pipelines.ingest.records_table import RecordsTable, count
from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.pipelines.ingest.sources import Source

MOST_FIELDS = 10_000
_FIRST_LINES = 1000  # of which the fields are looked up before all is read
_SCHEMA = pa.schema([("file", pa.int32()), ("line", pa.int64()), ("line_text", pa.large_string())])
_BLANK = "E' \\t\\n\\r\\x0b\\x0c'"
_MARK = "chr(65279)"  # a byte-order mark, where files were joined


def load_text(
    connection: duckdb.DuckDBPyConnection, sources: Sequence[Source], options: IngestOptions, bad: Sink
) -> RecordsTable:
    """Load lines that are not blank as the column `text`."""
    run(
        connection,
        f"""CREATE TEMP TABLE records AS SELECT line_text AS c0, file, line FROM (SELECT CASE
        WHEN line_text[1] = {_MARK} THEN ltrim(line_text, {_MARK}) ELSE line_text END AS line_text, file, line
        FROM source_lines) WHERE CASE WHEN line_text >= '!' THEN true ELSE ltrim(line_text, {_BLANK}) <> '' END""",
        source_lines=pa.RecordBatchReader.from_batches(_SCHEMA, _batches(sources, options, bad)),
    )
    return _loaded(connection, sources, ("text",))


def load_json(
    connection: duckdb.DuckDBPyConnection, sources: Sequence[Source], options: IngestOptions, bad: Sink
) -> RecordsTable:
    """Load lines that are JSON objects; their fields are columns in the order in which they are first met.

    The first lines' fields are taken for those of all; where others turn up, everything is read again with them.

    Raises:
      ValueError: more fields than a table can have columns.
    """
    first = islice(_batches(sources, options, lambda _: None), 1)
    names = _extract(connection, (), (batch.slice(0, _FIRST_LINES) for batch in first))
    new = _extract(connection, names, _batches(sources, options, bad))
    while new:
        names = (*names, *new)
        new = _extract(connection, names, _batches(sources, options, lambda _: None))
    for file, line, data, keys in streamed(connection, "SELECT file, line, data, keys FROM odd ORDER BY number"):
        error = _cannot_be(json.loads(keys)) if keys else ""
        bad(Bad(sources[file].name, line, error or _what_is_wrong(data), excerpt(data)))
    if run(connection, "SELECT 1 FROM odd LIMIT 1"):
        run(connection, "CREATE TEMP TABLE good AS SELECT * FROM records WHERE odd IS NULL ORDER BY rowid")
        run(connection, "DROP TABLE records")
        run(connection, "ALTER TABLE good RENAME TO records")
    return _loaded(connection, sources, names)


def _extract(
    connection: duckdb.DuckDBPyConnection, names: tuple[str, ...], batches: Iterator[pa.RecordBatch]
) -> tuple[str, ...]:
    """Make the table `records` of fields, and `odd` of the lines that hold others, or that cannot be records.

    A line is told by its number of keys: it is that of the fields found, unless one is unknown or there twice.

    Returns:
      Fields that records have beside those of `names`.
    """
    run(connection, "DROP TABLE IF EXISTS records")
    run(connection, "DROP TABLE IF EXISTS odd")
    columns = "".join(f"fields[{i + 1}] AS c{i}, " for i in range(len(names)))
    paths = ", ".join(text(_pointer(name)) for name in names)
    run(
        connection,
        f"""CREATE TEMP TABLE records AS SELECT {columns} file, line, CASE WHEN fields IS NULL OR len(fields) = 0
        THEN line_text WHEN len(json_keys(line_text)) <> list_count(fields) OR list_count(fields) = 0 THEN line_text
        END AS odd FROM (SELECT file, line, line_text, CASE WHEN line_text[1] = '{{'
        THEN TRY(json_extract(line_text, [{paths}]::VARCHAR[])::VARCHAR[]) END AS fields FROM (SELECT file, line,
        CASE WHEN line_text[1] = '{{' THEN line_text ELSE ltrim(line_text, {_BLANK} || {_MARK}) END AS line_text
        FROM source_lines) WHERE line_text <> '')""",
        source_lines=pa.RecordBatchReader.from_batches(_SCHEMA, batches),
    )
    run(
        connection,
        """CREATE TEMP TABLE odd AS SELECT rowid AS number, file, line, odd AS data,
        CASE WHEN odd[1] = '{' THEN to_json(TRY(json_keys(odd)))::VARCHAR END AS keys FROM records WHERE odd IS NOT NULL""",
    )
    known = dict.fromkeys(names)
    for (keys,) in run(connection, "SELECT keys FROM odd WHERE keys IS NOT NULL GROUP BY keys ORDER BY min(number)"):
        here = json.loads(keys)
        known |= {} if _cannot_be(here) else dict.fromkeys(here)
        if len(known) > MOST_FIELDS:
            raise ValueError(
                f"the lines have more than {MOST_FIELDS:,} different fields, the last {here[-1]!r}; a pool's columns "
                "must be known names: put what varies into one field as an object"
            )
    return tuple(known)[len(names) :]


def _batches(sources: Sequence[Source], options: IngestOptions, bad: Sink) -> Iterator[pa.RecordBatch]:
    """Read all files as Arrow batches of lines; `bad` takes what is no text."""
    for index, source in enumerate(sources):
        try:
            for lines in read_lines(source, options.max_record_bytes):
                numbers, texts = good_lines(source.name, lines, options.max_record_bytes, bad)
                files, places = (
                    pa.Array.from_buffers(type_, len(numbers), [None, pa.py_buffer(values)])
                    for type_, values in ((pa.int32(), np.full(len(numbers), index, np.int32)), (pa.int64(), numbers))
                )
                yield pa.record_batch([files, places, pc.ascii_rtrim(texts, "\r\n")], schema=_SCHEMA)
        except DAMAGES as e:
            bad(damage(source, e))


def _loaded(connection: duckdb.DuckDBPyConnection, sources: Sequence[Source], names: tuple[str, ...]) -> RecordsTable:
    def places(rows: Sequence[int]) -> list[tuple[str, int | None]]:
        wanted = pa.table({"number": pa.array(rows, pa.int64())})
        sql = "SELECT file, line FROM records JOIN wanted ON records.rowid = number ORDER BY number"
        return [(sources[file].name, line) for file, line in run(connection, sql, wanted=wanted)]

    return RecordsTable(connection, names, count(connection), places)


def _what_is_wrong(line: str) -> str:
    """Say in the words of Python's reader what is wrong with a line that DuckDB's refused."""
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            return f"a line must be a JSON object, got {type(value).__name__}"
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "not JSON: half a surrogate pair, which no text can hold"
    except (ValueError, RecursionError) as e:
        return f"not JSON: {e}"
    return "not JSON that DuckDB reads"


def _cannot_be(keys: list[str]) -> str:
    if not keys:
        return "a line must have at least one field"
    twice = (
        next((name for i, name in enumerate(keys) if name in keys[:i]), None) if len(set(keys)) < len(keys) else None
    )
    if twice is not None:
        return f"a line must have every field once, got {twice!r} twice"
    return "a field's name must not hold a zero byte" if any("\0" in name for name in keys) else ""


def _pointer(name: str) -> str:
    """Write the JSON pointer (RFC 6901) to a field of the whole object."""
    return "/" + name.replace("~", "~0").replace("/", "~1")
