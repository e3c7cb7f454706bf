"""The rows that stay, as the pool's Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distilbeam.pipelines.ingest.settings import IngestOptions
from distilbeam.storage.atomic import replacing

_GROUP_ROWS, _GROUP_BYTES = 65_536, 16 * 2**20


def write_pool(tables: Iterator[pa.Table], schema: pa.Schema, pool: Path, options: IngestOptions) -> list[Path]:
    """Write tables as `part-00000.parquet` and so on; a file is closed when it has enough rows or bytes.

    Args:
      tables: the rows; read one ahead in a thread.
      schema: the pool's schema.
      pool: directory of the files.
      options: sizes of a file.

    Returns:
      The files.
    """
    files: list[Path] = []
    groups = _groups(_ahead(tables), min(_GROUP_ROWS, options.file_rows))
    group = next(groups, None)
    while group is not None:
        files.append(pool / f"part-{len(files):05d}.parquet")
        rows = size = 0
        with (
            replacing(files[-1]) as temporary,
            pq.ParquetWriter(temporary, schema, **_parquet_options(group)) as writer,
        ):
            while group is not None and rows < options.file_rows and size < options.file_bytes:
                writer.write_table(group, row_group_size=group.num_rows)
                rows, size = rows + group.num_rows, size + group.nbytes
                group = next(groups, None)
    return files


def without(tables: Iterable[pa.Table], dropped: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
    """Leave out rows by their numbers, counted over all tables, ascending."""
    start = 0
    for table in tables:
        stop = start + table.num_rows
        here = dropped[np.searchsorted(dropped, start) : np.searchsorted(dropped, stop)] - start
        start = stop
        if len(here):
            kept = np.ones(table.num_rows, bool)
            kept[here] = False
            # `pa.array` imports pandas, which takes .2 s
            bits = pa.py_buffer(np.packbits(kept, bitorder="little"))
            table = table.filter(pa.Array.from_buffers(pa.bool_(), len(kept), [None, bits]))
        yield table


def _ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Make the next table while the one before is written."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = thread.submit(next, tables, None)
            yield table


def _groups(tables: Iterator[pa.Table], most: int) -> Iterator[pa.Table]:
    """Gather tables into row groups of bounded rows and bytes."""
    waiting: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        step = max(1, min(most, _GROUP_BYTES * table.num_rows // max(1, table.nbytes)))
        start = 0
        while start < table.num_rows:
            part = table.slice(start, min(step, most - rows))
            if waiting and size + part.nbytes > _GROUP_BYTES:
                yield pa.concat_tables(waiting)
                waiting, rows, size = [], 0, 0
            waiting.append(part)
            start, rows, size = start + part.num_rows, rows + part.num_rows, size + part.nbytes
            if rows == most:
                yield pa.concat_tables(waiting)
                waiting, rows, size = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting)


def _parquet_options(group: pa.Table) -> dict[str, Any]:
    """Compress what can be compressed: neither random mantissas nor images, whose bytes are compressed already.

    Text that mostly repeats itself gets a dictionary; for other text that takes time and makes the file larger.
    """
    schema = group.schema
    plain = {
        field.name for field in schema if field.name == "image" or (field.metadata or {}).get(b"dtype") == b"float32"
    }
    repeating = [
        field.name
        for field in schema
        if pa.types.is_string(field.type) and 2 * pc.count_distinct(group[field.name]).as_py() <= group.num_rows
    ]
    return {
        "compression": {field.name: "none" if field.name in plain else "zstd" for field in schema},
        "use_dictionary": repeating,
        "write_page_checksum": True,
    }
