"""Dead letters: the records that cannot be used, in the order of the sources, however many there are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from distilbeam.pipelines.ingest.database import run, streamed
from distilbeam.pipelines.ingest.records import Bad
from distilbeam.pipelines.ingest.sources import Source
from distilbeam.storage.atomic import replacing

_SCHEMA = pa.schema([("file", pa.int64()), ("line", pa.int64()), ("letter", pa.large_string())])
_AT_ONCE = 10_000


class Letters:
    """Collects bad records in a file and sorts them at the end."""

    def __init__(self, path: Path, sources: Sequence[Source]) -> None:
        self.count = 0
        self._places: dict[str, int] = {}
        for i, source in enumerate(sources):
            self._places.setdefault(source.name, i)
        self._path = path
        self._file = path.open("w")

    def close(self) -> None:
        """Take no more."""
        self._file.close()

    def add(self, bad: Bad) -> None:
        """Add a bad record."""
        place = self._places[bad.file]
        letter = (
            json.dumps(bad.to_json(), ensure_ascii=False).encode(errors="replace").decode()
        )  # half a pair is no text
        self._file.write(json.dumps([place, bad.line, letter]) + "\n")
        self.count += 1

    def write(self, connection: duckdb.DuckDBPyConnection, target: Path) -> dict[str, Any] | None:
        """Write all to a file of JSON lines, if there are any; return the first."""
        self.close()
        if not self.count:
            return None
        reader = pa.RecordBatchReader.from_batches(_SCHEMA, self._batches())
        run(connection, "CREATE TEMP TABLE letters AS SELECT * FROM reader", reader=reader)
        first: dict[str, Any] | None = None
        with replacing(target) as temporary, temporary.open("w", encoding="utf-8") as out:
            for (letter,) in streamed(connection, "SELECT letter FROM letters ORDER BY file, line NULLS LAST, rowid"):
                first = first or json.loads(letter)
                out.write(letter + "\n")
        return first

    def _batches(self) -> Iterator[pa.RecordBatch]:
        with self._path.open() as file:
            lines = map(json.loads, file)
            while rows := list(islice(lines, _AT_ONCE)):
                yield pa.record_batch([pa.array(column) for column in zip(*rows, strict=True)], schema=_SCHEMA)
