"""Writing a shard: the Parquet file first, then the manifest entry that commits it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.storage.atomic import replacing
from distilbeam.storage.paths import to_path
from distilbeam.teacher.softlabels.columns import SPEC_KEY, check_columns, label_schema, parquet_options
from distilbeam.teacher.softlabels.manifest import ManifestEntry, write_entry
from distilbeam.teacher.softlabels.spec import SoftLabelSpec

ROW_GROUP_BYTES = 16 * 2**20
_HASHES: Mapping[str, Any] = {"sha256": hashlib.sha256, "blake2b": partial(hashlib.blake2b, digest_size=16)}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*")


def write_shard(
    directory: str | Path,
    name: str,
    rows: pa.Table | pa.RecordBatch | Iterable[pa.RecordBatch],
    spec: SoftLabelSpec,
    key: str,
    extra: Mapping[str, Any] | None = None,
) -> ManifestEntry:
    """Write a shard of soft labels and commit it.

    A repeated call replaces the shard. After a crash at any moment the dataset holds the whole shard or nothing of it.

    Args:
      directory: the soft-label dataset; made if it is not there.
      name: file name without a suffix: letters, digits, `.`, `_`, `=` and `-`.
      rows: the rows with example_id, carried columns, label columns and whatever else belongs to them.
      spec: the dataset's specification, which footer and entry repeat.
      key: key under which the shard is committed (`label_key`).
      extra: further facts for the manifest entry, as JSON values.

    Returns:
      The manifest entry.

    Raises:
      ValueError: no rows, a column of the specification is missing or of another type, missing values in a label
        column, or a name that is not a file name.
    """
    entry = write_file(directory, name, rows, spec, key, extra, flushed=True)
    write_entry(directory, entry)
    return entry


def write_file(
    directory: str | Path,
    name: str,
    rows: pa.Table | pa.RecordBatch | Iterable[pa.RecordBatch],
    spec: SoftLabelSpec,
    key: str,
    extra: Mapping[str, Any] | None,
    *,
    flushed: bool,
) -> ManifestEntry:
    """Write a shard's file, see `write_shard`, and return the entry that would commit it."""
    for what, text in (("name", name), ("key", key)):
        if not _NAME.fullmatch(text):
            raise ValueError(f"{what} must be letters, digits, '.', '_', '=' and '-', got '{text}'")
    schema, batches = _stream(rows)
    schema = _checked(schema, spec)
    target = to_path(directory) / f"{name}.parquet"
    with replacing(target, flushed=flushed) as temporary:
        count = _write(temporary, schema, batches, name)
        size, checksum, footer = temporary.stat().st_size, file_checksum(temporary), footer_checksum(temporary)
    return ManifestEntry(key, target.name, count, size, checksum, spec, dict(extra or {}), footer)


def file_checksum(path: Path, algorithm: str = "sha256") -> str:
    """Hash a file.

    Args:
      path: the shard's Parquet file.
      algorithm: `sha256`, which processors have instructions for, or `blake2b`, which older manifests name.

    Returns:
      The algorithm, `:` and hexadecimal digits: 64, or 32 for blake2b.

    Raises:
      ValueError: another algorithm.
    """
    if algorithm not in _HASHES:
        raise ValueError(f"a checksum must be of {' or '.join(_HASHES)}, got '{algorithm}'")
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, _HASHES[algorithm]).hexdigest()}"


def footer_checksum(path: Path) -> str:
    """Hash the footer of a Parquet file, which says how its pages are to be read and has no checksum of its own.

    Returns:
      16 hexadecimal digits; those of nothing where the file does not end as Parquet files do.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(8)[:4], "little") + 8
        file.seek(max(0, size - length))
        footer = file.read() if length <= size else b""
    return hashlib.blake2b(footer, digest_size=8).hexdigest()


def has_checksum(path: Path, checksum: str) -> bool:
    """Tell whether a file has a checksum that a manifest names.

    Raises:
      ValueError: a checksum of an unknown algorithm.
    """
    return file_checksum(path, checksum.partition(":")[0]) == checksum


def _stream(rows: pa.Table | pa.RecordBatch | Iterable[pa.RecordBatch]) -> tuple[pa.Schema, Iterator[pa.Table]]:
    if isinstance(rows, (pa.Table, pa.RecordBatch)):
        table = rows if isinstance(rows, pa.Table) else pa.Table.from_batches([rows])
        return table.schema, iter([table])
    batches = iter(rows)
    first = next(batches, None)
    if first is None:
        raise ValueError("a shard must have at least one row, got no batch")
    return first.schema, (pa.Table.from_batches([batch]) for batch in _chain(first, batches))


def _chain(first: pa.RecordBatch, rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from rest


def _checked(schema: pa.Schema, spec: SoftLabelSpec) -> pa.Schema:
    """Check the columns and give the label columns their exact types and the specification."""
    missing = [name for name in ("example_id", *spec.carried) if name not in schema.names]
    if missing:
        raise ValueError(f"a shard must have a column {missing[0]}; the columns are {', '.join(schema.names)}")
    check_columns(schema, spec)
    exact = label_schema(spec)
    fields = [exact.field(field.name) if field.name in exact.names else field for field in schema]
    return pa.schema(fields, metadata={**(schema.metadata or {}), SPEC_KEY: spec.to_json()})


def _write(path: Path, schema: pa.Schema, tables: Iterable[pa.Table], name: str) -> int:
    count = 0
    with pq.ParquetWriter(path, schema, **parquet_options(schema)) as writer:
        for table in tables:
            if table.num_rows:
                _refuse_missing(table, schema)
                row_bytes = max(1, table.nbytes // table.num_rows)
                writer.write_table(table.cast(schema), row_group_size=max(1, ROW_GROUP_BYTES // row_bytes))
            count += table.num_rows
    if count == 0:
        raise ValueError(f"a shard must have at least one row, '{name}' has none")
    return count


def _refuse_missing(table: pa.Table, schema: pa.Schema) -> None:
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            raise ValueError(f"column {field.name} must not have missing values, got {table[field.name].null_count:,}")
