"""Files that a streaming job writes through Beam's file systems, whatever these are: an object appears whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from distilbeam.storage.atomic import replacing
from distilbeam.storage.files import write_parquet
from distilbeam.storage.paths import is_remote
from distilbeam.teacher.softlabels import ManifestEntry, SoftLabelSpec, entry_path, write_shard


def write_shard_anywhere(
    directory: str, name: str, table: pa.Table, spec: SoftLabelSpec, extra: Mapping[str, Any]
) -> ManifestEntry:
    """Write a shard of soft labels, then the manifest entry that commits it; see `softlabels.write_shard`."""
    if not is_remote(directory):
        return write_shard(directory, name, table, spec, name, extra)
    with tempfile.TemporaryDirectory() as local:
        entry = write_shard(local, name, table, spec, name, extra)
        entry_file = entry_path(local, name)
        for file in (Path(local) / entry.path, entry_file):
            _put(file, FileSystems.join(directory, *file.relative_to(local).parts))
    return entry


def write_parquet_anywhere(directory: str, name: str, table: pa.Table) -> None:
    """Write a small table as a Parquet file."""
    if not is_remote(directory):
        write_parquet(Path(directory) / name, table)
        return
    with tempfile.TemporaryDirectory() as local:
        pq.write_table(table, Path(local) / name, compression="zstd")
        _put(Path(local) / name, FileSystems.join(directory, name))


def write_text_anywhere(directory: str, folder: str, name: str, text: str) -> None:
    """Write a text file into a folder of a directory."""
    if not is_remote(directory):
        with replacing(Path(directory) / folder / name) as temporary:
            temporary.write_text(text)
        return
    with FileSystems.create(
        FileSystems.join(directory, folder, name), compression_type=CompressionTypes.UNCOMPRESSED
    ) as sink:
        sink.write(text.encode())


def exists_anywhere(directory: str, *parts: str) -> bool:
    """Tell whether there is a file in a directory."""
    if not is_remote(directory):
        return Path(directory, *parts).exists()
    return bool(FileSystems.exists(FileSystems.join(directory, *parts)))


def _put(file: Path, target: str) -> None:
    with (
        file.open("rb") as source,
        FileSystems.create(target, compression_type=CompressionTypes.UNCOMPRESSED) as sink,
    ):
        shutil.copyfileobj(source, sink)
