"""Write: what is left of the parsed rows, as the pool's Parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.ingest.committing import FilePerItem
from distilbeam.pipelines.ingest.duplicates import Compare
from distilbeam.pipelines.ingest.records import Bad
from distilbeam.teacher.softlabels.atomic import replacing

_GROUP_ROWS, _GROUP_BYTES = 65_536, 16 * 2**20


@dataclass(frozen=True)
class PoolFile:
    """A file of the pool: its number and the units whose rows it holds."""

    number: int
    units: tuple[int, ...]


@dataclass(frozen=True)
class Write(FilePerItem[PoolFile]):
    """The work of the write phase.

    Attributes:
      compare: the parsed rows and which of them lose.
      schema: the pool's schema.
      pool: directory of the pool's files.
      letters: directory of the bad records that only comparing showed.
    """

    compare: Compare
    schema: pa.Schema
    pool: str
    letters: str

    def __call__(self, item: PoolFile) -> None:
        """Write the file."""
        losers = self.compare.read(item.units)
        conflicts: list[Bad] = []
        with replacing(self.file(item)) as temporary:
            with pq.ParquetWriter(temporary, self.schema, **_parquet_options(self.schema)) as writer:
                for group in _groups(self._tables(item, losers, conflicts)):
                    writer.write_table(group, row_group_size=group.num_rows)
            with replacing(Path(self.letters) / f"{item.number:05d}.jsonl") as letters:
                letters.write_text("".join(json.dumps(bad.to_json(), ensure_ascii=False) + "\n" for bad in conflicts))

    def name(self, item: PoolFile) -> str:
        """Name the file."""
        return f"pool file {self.file(item).name}"

    def file(self, item: PoolFile) -> Path:
        """Return the file that commits the item."""
        return Path(self.pool) / f"part-{item.number:05d}.parquet"

    def _tables(self, item: PoolFile, losers: npt.NDArray[Any], conflicts: list[Bad]) -> Iterator[pa.Table]:
        for unit in item.units:
            here = losers[losers["unit"] == unit]
            lost, wrong = set(here["row"].tolist()), set(here["row"][here["conflict"]].tolist())
            start = 0
            for batch in _batches(self.compare.parts[unit]):
                rows = range(start, start + batch.num_rows)
                conflicts += [_conflict(batch, row - start) for row in rows if row in wrong] if wrong else []
                kept = np.array([row not in lost for row in rows], bool) if lost else None
                table = pa.Table.from_batches([batch if kept is None else batch.filter(pa.array(kept))])
                yield table.select(self.schema.names).cast(self.schema)
                start += batch.num_rows


def plan_pool_files(rows: Sequence[int], sizes: Sequence[int], file_rows: int, file_bytes: int) -> list[PoolFile]:
    """Group consecutive units with rows that stay into files.

    Args:
      rows: rows of each unit that stay.
      sizes: bytes of each unit's rows.
      file_rows: a file is closed when it has as many rows.
      file_bytes: or as many bytes.
    """
    files: list[PoolFile] = []
    waiting: list[int] = []
    for unit in np.flatnonzero(np.asarray(rows)).tolist():
        waiting.append(unit)
        if sum(rows[u] for u in waiting) >= file_rows or sum(sizes[u] for u in waiting) >= file_bytes:
            files.append(PoolFile(len(files), tuple(waiting)))
            waiting = []
    return [*files, PoolFile(len(files), tuple(waiting))] if waiting else files


def _parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Compress what can be compressed: neither random mantissas nor images, whose bytes are compressed already."""
    plain = {
        field.name for field in schema if field.name == "image" or (field.metadata or {}).get(b"dtype") == b"float32"
    }
    return {
        "compression": {field.name: "none" if field.name in plain else "zstd" for field in schema},
        "use_dictionary": [field.name for field in schema if pa.types.is_string(field.type) and field.name != "id"],
        "write_page_checksum": True,
    }


def _groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Gather tables into row groups of bounded rows and bytes."""
    waiting: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        step = max(1, min(_GROUP_ROWS, _GROUP_BYTES * table.num_rows // max(1, table.nbytes)))
        for start in range(0, table.num_rows, step):
            part = table.slice(start, step)
            if waiting and (rows + part.num_rows > _GROUP_ROWS or size + part.nbytes > _GROUP_BYTES):
                yield pa.concat_tables(waiting)
                waiting, rows, size = [], 0, 0
            waiting.append(part)
            rows, size = rows + part.num_rows, size + part.nbytes
    if waiting:
        yield pa.concat_tables(waiting)


def _batches(path: str) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(path) as file:
        reader = pa.ipc.open_file(file)
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)


def _conflict(batch: pa.RecordBatch, row: int) -> Bad:
    file, line = batch.column("_file")[row].as_py(), batch.column("_line")[row].as_py()
    return Bad(file, line, "the id of this record is that of an earlier one with other content")
