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

from distilbeam.pipelines.ingest.database import run, streamed, text
from distilbeam.pipelines.ingest.lines import DAMAGES, damage, good_lines, read_lines
from distilbeam.pipelines.ingest.records import Bad, Sink, excerpt
from distilbeam.pipelines.ingest.records_table import RecordsTable, count, id_of
from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.pipelines.ingest.sources import Source

MOST_FIELDS = 10_000
_SCHEMA = pa.schema([("file", pa.int32()), ("line", pa.int64()), ("line_text", pa.large_string())])
_BLANK = "E' \\t\\n\\r\\x0b\\x0c'"
_ENDS = "E'\\r\\n'"
_MARK = "chr(65279)"  # a byte-order mark, where files were joined
# JSON, an object, every field once; a name with a zero byte cannot be a column's
_KEYS = """CASE WHEN json_valid(line_text) THEN CASE json_type(line_text) WHEN 'OBJECT' THEN json_keys(line_text) END END"""
_USABLE = "len(list_distinct(keys)) = len(keys) AND NOT contains(array_to_string(keys, ''), chr(0))"


def load_text(
    connection: duckdb.DuckDBPyConnection, sources: Sequence[Source], options: IngestOptions, bad: Sink
) -> RecordsTable:
    """Load lines that are not blank as the column `text`."""
    line = f"ltrim(rtrim(line_text, {_ENDS}), {_MARK})"
    run(
        connection,
        f"""CREATE TABLE records AS SELECT line_text AS c0, {id_of({"text": "line_text"})} AS id, file, line
        FROM (SELECT {line} AS line_text, file, line FROM lines) WHERE trim(line_text, {_BLANK}) <> ''""",
        lines=_reader(sources, options, bad),
    )
    return _loaded(connection, sources, ("text",))


def load_json(
    connection: duckdb.DuckDBPyConnection, sources: Sequence[Source], options: IngestOptions, bad: Sink
) -> RecordsTable:
    """Load lines that are JSON objects; their fields are columns in the order in which they are first met.

    Raises:
      ValueError: more fields than a table can have columns.
    """
    run(
        connection,
        f"""CREATE TABLE lines AS SELECT file, line, line_text, CASE WHEN {_USABLE} THEN keys END AS keys
        FROM (SELECT file, line, line_text, {_KEYS} AS keys
        FROM (SELECT file, line, trim(line_text, {_BLANK} || {_MARK}) AS line_text FROM source_lines)
        WHERE line_text <> '')""",
        source_lines=_reader(sources, options, bad),
    )
    unusable = "SELECT file, line, line_text FROM lines WHERE keys IS NULL"
    for file, line, data in streamed(connection, unusable):
        bad(Bad(sources[file].name, line, _what_is_wrong(data), excerpt(data)))
    names = _names(connection)
    extracted = {name: f"fields[{i + 1}]" for i, name in enumerate(names)}
    columns = [f"{value} AS c{i}" for i, value in enumerate(extracted.values())]
    values = ", ".join([*columns, f"{id_of(extracted)} AS id", "file", "line"])
    paths = ", ".join(text(_pointer(name)) for name in names)
    run(
        connection,
        f"""CREATE TABLE records AS SELECT {values} FROM (SELECT file, line,
        json_extract(line_text, [{paths}]::VARCHAR[])::VARCHAR[] AS fields FROM lines WHERE len(keys) > 0)""",
    )
    run(connection, "DROP TABLE lines")
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
                yield pa.record_batch([files, pa.array(numbers), texts], schema=_SCHEMA)
        except DAMAGES as e:
            bad(damage(source, e))


def _loaded(
    connection: duckdb.DuckDBPyConnection, sources: Sequence[Source], names: tuple[str, ...]
) -> RecordsTable:
    def places(rows: Sequence[int]) -> list[tuple[str, int | None]]:
        wanted = pa.table({"number": pa.array(rows, pa.int64())})
        sql = "SELECT file, line FROM records JOIN wanted ON records.rowid = number ORDER BY number"
        return [(sources[file].name, line) for file, line in run(connection, sql, wanted=wanted)]

    return RecordsTable(connection, names, count(connection), places)


def _what_is_wrong(line: str) -> str:
    """Say in the words of Python's reader what is wrong with a line that DuckDB's refused."""
    try:
        value = json.loads(line, object_pairs_hook=_without_repetition)
        if not isinstance(value, dict):
            return f"a line must be a JSON object, got {type(value).__name__}"
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "not JSON: half a surrogate pair, which no text can hold"
    except (ValueError, RecursionError) as e:
        return f"not JSON: {e}"
    return "not JSON, or a field's name holds a zero byte"


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there twice")
    return found


def _names(connection: duckdb.DuckDBPyConnection) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for (keys,) in run(connection, "SELECT keys FROM lines WHERE keys IS NOT NULL GROUP BY keys ORDER BY min(rowid)"):
        names |= dict.fromkeys(keys)
        if len(names) > MOST_FIELDS:
            raise ValueError(
                f"the lines have more than {MOST_FIELDS:,} different fields, the last {list(names)[-1]!r}; a pool's "
                "columns must be known names: put what varies into one field as an object"
            )
    return tuple(names)


def _pointer(name: str) -> str:
    """Write the JSON pointer (RFC 6901) to a field of the whole object."""
    return "/" + name.replace("~", "~0").replace("/", "~1")
