"""Text and JSON lines -> the table of records, by DuckDB's functions for JSON.

A field of a JSON line is kept as its JSON text, so that 1, 1.0 and "1" are three things; a field that a line does not have
is null.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from distilbeam.pipelines.ingest.database import run, streamed, text
from distilbeam.pipelines.ingest.lines import DAMAGES, damage, good_lines, read_lines
from distilbeam.pipelines.ingest.records import Bad, Sink, excerpt
from distilbeam.pipelines.ingest.records_table import RecordsTable, count, id_of
from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.pipelines.ingest.sources import Source

MOST_FIELDS = 10_000
_SCHEMA = pa.schema([("file", pa.int32()), ("line", pa.int64()), ("line_text", pa.large_string())])
_BLANK = "E' \\t\\n\\r\\x0b\\x0c'"
_MARK = "chr(65279)"  # a byte-order mark, where files were joined
_KEYS = "CASE WHEN line_text[1] = '{' THEN to_json(TRY(json_keys(line_text)))::VARCHAR END"  # of objects


def load_text(
    connection: duckdb.DuckDBPyConnection, sources: Sequence[Source], options: IngestOptions, bad: Sink
) -> RecordsTable:
    """Load lines that are not blank as the column `text`."""
    run(
        connection,
        f"""CREATE TABLE records AS SELECT line_text AS c0, {id_of({"text": "line_text"})} AS id, file, line
        FROM (SELECT ltrim(line_text, {_MARK}) AS line_text, file, line FROM source_lines)
        WHERE ltrim(line_text, {_BLANK}) <> ''""",
        source_lines=_reader(sources, options, bad),
    )
    return _loaded(connection, sources, ("text",))


def load_json(
    connection: duckdb.DuckDBPyConnection, sources: Sequence[Source], options: IngestOptions, bad: Sink
) -> RecordsTable:
    """Load lines that are JSON objects; their fields are columns in the order in which they are first met.

    Raises:
      ValueError: more fields than a table can have columns.
    """
    trimmed = f"ltrim(line_text, {_BLANK} || {_MARK})"
    run(
        connection,
        f"""CREATE TABLE seen AS SELECT file, line, keys, CASE WHEN keys IS NULL THEN line_text END AS line_text FROM (
        SELECT file, line, {_KEYS} AS keys, line_text FROM (SELECT file, line, {trimmed} AS line_text FROM source_lines)
        WHERE line_text <> '')""",
        source_lines=_reader(sources, options, bad),
    )
    names, refused = _names(connection)
    unusable = " OR ".join(["keys IS NULL", *(f"keys = {text(keys)}" for keys in refused)])
    for file, line, keys, data in streamed(
        connection, f"SELECT file, line, keys, line_text FROM seen WHERE {unusable}"
    ):
        bad(Bad(sources[file].name, line, refused[keys] if keys else _what_is_wrong(data), excerpt(data or keys)))
    run(connection, "DROP TABLE seen")
    extracted = {name: f"fields[{i + 1}]" for i, name in enumerate(names)}
    columns = [f"{value} AS c{i}" for i, value in enumerate(extracted.values())]
    values = ", ".join([*columns, f"{'NULL' if options.id_column else id_of(extracted)} AS id", "file", "line"])
    paths = ", ".join(text(_pointer(name)) for name in names)
    usable = " AND ".join(["fields IS NOT NULL", *(f"{_KEYS} <> {text(keys)}" for keys in refused)])
    run(  # the files are read again: that takes less than to keep their text between
        connection,
        f"""CREATE TABLE records AS SELECT {values} FROM (SELECT file, line, line_text, CASE WHEN line_text[1] = '{{'
        THEN TRY(json_extract(line_text, [{paths}]::VARCHAR[])::VARCHAR[]) END AS fields
        FROM (SELECT file, line, {trimmed} AS line_text FROM source_lines)) WHERE {usable}""",
        source_lines=_reader(sources, options, lambda _: None),
    )
    return _loaded(connection, sources, names)


def _reader(sources: Sequence[Source], options: IngestOptions, bad: Sink) -> pa.RecordBatchReader:
    """Read all files as Arrow batches of lines; `bad` takes what is no text."""
    return pa.RecordBatchReader.from_batches(_SCHEMA, _batches(sources, options, bad))


def _batches(sources: Sequence[Source], options: IngestOptions, bad: Sink) -> Iterator[pa.RecordBatch]:
    for index, source in enumerate(sources):
        try:
            for lines in read_lines(source, options.max_record_bytes):
                numbers, texts = good_lines(source.name, lines, options.max_record_bytes, bad)
                files = pa.array(np.full(len(numbers), index, np.int32))
                yield pa.record_batch([files, pa.array(numbers), pc.ascii_rtrim(texts, "\r\n")], schema=_SCHEMA)
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


def _names(connection: duckdb.DuckDBPyConnection) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the fields of all lines, and which lists of fields no record can have, with what is wrong with them."""
    names: dict[str, None] = {}
    refused: dict[str, str] = {}
    for (keys,) in run(connection, "SELECT keys FROM seen WHERE keys IS NOT NULL GROUP BY keys ORDER BY min(rowid)"):
        here = json.loads(keys)
        if error := _cannot_be(here):
            refused[keys] = error
            continue
        names |= dict.fromkeys(here)
        if len(names) > MOST_FIELDS:
            raise ValueError(
                f"the lines have more than {MOST_FIELDS:,} different fields, the last {here[-1]!r}; a pool's columns "
                "must be known names: put what varies into one field as an object"
            )
    return tuple(names), refused


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
