"""TFRecord files and images with types: the phases that read them, and their rows as Arrow tables of the pool's schema."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from distilbeam.pipelines.engine.display import Display
from distilbeam.pipelines.ingest.columns import ColumnType, merge_counts
from distilbeam.pipelines.ingest.database import run
from distilbeam.pipelines.ingest.index import Index, group_sources
from distilbeam.pipelines.ingest.parse import INTERNAL, Parse, Survey, image_columns
from distilbeam.pipelines.ingest.pool_columns import PoolColumns, pool_columns
from distilbeam.pipelines.ingest.records import Bad
from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.pipelines.ingest.sources import Source, SourceUnit, plan_source_units
from distilbeam.pipelines.ingest.tfrecord import require_checksums
from distilbeam.storage.files import read_json

_KEY, _CONTENT, _FILE, _LINE = range(-len(INTERNAL), 0)


@dataclass(frozen=True)
class ParsedRecords:
    """Records that a parse phase wrote.

    Attributes:
      parse: the phase.
      units: its items, in the order of the sources.
      pool: the pool's columns.
      rows: number of records.
      unusable: number of bad records.
    """

    parse: Parse
    units: Sequence[SourceUnit]
    pool: PoolColumns
    rows: int
    unusable: int

    key, columns = "key", None  # see `typed_text.TypedText`

    @property
    def content(self) -> str | None:
        """The expression for all of a record, where the key is not a hash of it."""
        return None if self.pool.id_column is None else "content"

    def load_keys(self, connection: duckdb.DuckDBPyConnection) -> None:
        """Make the table `records` of keys and contents, and an empty table `bad`."""
        schema = pa.schema(INTERNAL[:2])
        batches = (
            pa.record_batch([batch.column(_index(batch, i)) for i in (_KEY, _CONTENT)], schema=schema)
            for batch in self._batches()
        )
        reader = pa.RecordBatchReader.from_batches(schema, batches)
        run(connection, "CREATE TEMP TABLE records AS SELECT * FROM reader", reader=reader)
        run(connection, "CREATE TEMP TABLE bad (number BIGINT)")

    def tables(self) -> Iterator[pa.Table]:
        """Read all rows in their order."""
        schema = self.pool.schema
        for batch in self._batches():
            yield pa.Table.from_arrays(batch.columns[: len(schema)], schema=schema)

    def bad(self) -> Iterator[Bad]:
        """Read the bad records."""
        for unit in self.units:
            with self.parse.files(unit)["bad"].open() as lines:
                yield from (Bad(**json.loads(line)) for line in lines)

    def places(self, numbers: Sequence[int]) -> list[tuple[str, int | None]]:
        """Find file and record of rows, given their numbers in ascending order."""
        found: list[tuple[str, int | None]] = []
        start = 0
        for batch in self._batches() if numbers else ():
            here = [number - start for number in numbers if start <= number < start + batch.num_rows]
            files, lines = batch.column(_index(batch, _FILE)), batch.column(_index(batch, _LINE))
            found += [(files[row].as_py(), lines[row].as_py()) for row in here]
            start += batch.num_rows
        return found

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for unit in self.units:
            with pa.memory_map(str(self.parse.files(unit)["rows"])) as file:
                reader = pa.ipc.open_file(file)
                for i in range(reader.num_record_batches):
                    yield reader.get_batch(i)


def parse_records(
    sources: Sequence[Source], options: IngestOptions, work: Path, *, beam: Any, display: Display, attempts: int
) -> ParsedRecords:
    """Run the phases index, survey and parse, or what is left of them; see `phases`.

    Args:
      sources: the files.
      options: how they are read.
      work: directory of what the phases commit.
      beam: Beam's options, or None for its defaults.
      display: where progress is shown.
      attempts: times that failed items are tried.
    """
    from distilbeam.pipelines.engine.beam_options import pipeline_options  # Beam takes seconds to import
    from distilbeam.pipelines.engine.phase import run_phase

    if options.format == "tfrecord":
        require_checksums()
    beam = pipeline_options() if beam is None else beam

    def phase(name: str, title: str, item_work: Any, items: Any) -> None:
        errors = work / "errors" / name
        with display.step(title) as progress:
            how: dict[str, Any] = {"options": beam, "progress": progress, "attempts": attempts, "models": False}
            run_phase(name, item_work, items, errors=errors, **how)

    groups = group_sources(sources, options.unit_bytes)
    index = Index(options, str(work / "index"))
    phase("index", "look through the sources", index, groups)
    units = plan_source_units((block for group in groups for block in index.read(group)), options.unit_bytes)
    found: dict[str, ColumnType] = image_columns(options)
    if options.format == "tfrecord":
        survey = Survey(options, str(work / "survey"))
        phase("survey", "find the columns' types", survey, units)
        counts = merge_counts(survey.read(unit) for unit in units)
        found = {name: count.decide(single=True) for name, count in counts.items()}
    pool = PoolColumns(found, {}, None) if not found else pool_columns(found, options)
    parse = Parse(options, str(work / "rows"), pool)
    phase("parse", "read the records", parse, units)
    commits = [read_json(parse.files(unit)["commit"]) for unit in units]
    totals = (sum(commit[name] for commit in commits) for name in ("rows", "bad"))
    return ParsedRecords(parse, units, pool, *totals)


def _index(batch: pa.RecordBatch, place: int) -> int:
    return int(np.arange(batch.num_columns)[place])
