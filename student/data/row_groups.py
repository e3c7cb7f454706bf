"""The row groups of soft-label datasets, as their manifests name them, and reading some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.storage.paths import StoreError, readable
from distilbeam.storage.stores import store_of
from distilbeam.teacher.softlabels import SoftLabelSpec, read_manifest
from distilbeam.teacher.softlabels.manifest import ManifestEntry
from distilbeam.teacher.softlabels.shards import footer_checksum

FOOTER_THREADS = 8  # a footer is mostly waiting for the filesystem


@dataclass(frozen=True)
class ShardFile:
    """A committed Parquet file; it is open only while it is read, so that there may be any number of them.

    Attributes:
      path: where it is.
      metadata: its footer.
      identity: what tells it from a file that replaces it.
    """

    path: Path
    metadata: pq.FileMetaData
    identity: tuple[Any, ...]

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns."""
        return self.metadata.schema.to_arrow_schema()

    def opened(self) -> pq.ParquetFile:
        """Open the file.

        Raises:
          ValueError: it is another one than when the datasets were opened.
        """
        store = store_of(self.path)
        if store.identity(self.path) != self.identity:
            raise ValueError(f"{self.path} was written again after the dataset was opened; open the dataset again")
        return store.open_parquet(self.path, metadata=self.metadata, mapped=True)


@dataclass(frozen=True)
class RowGroup:
    """A row group.

    Attributes:
      file: the file it is in.
      number: its number there.
      rows: its rows.
      first_row: the first of its rows in all datasets together.
    """

    file: ShardFile
    number: int
    rows: int
    first_row: int

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Read columns, and decode them in the calling thread: of which there may be more than Arrow has of its own."""
        with self.file.opened() as file, _found_damage(self.file.path):
            return file.read_row_group(self.number, columns=list(columns), use_threads=False)

    def first(self, columns: Sequence[str]) -> pa.RecordBatch:
        """Read columns of the first row."""
        with self.file.opened() as file, _found_damage(self.file.path):
            return next(file.iter_batches(1, [self.number], list(columns)))


@dataclass(frozen=True)
class Datasets:
    """Datasets that mean the same.

    Attributes:
      spec: their specification.
      groups: the row groups of each.
      keys: what identifies their contents, as JSON values.
    """

    spec: SoftLabelSpec
    groups: list[list[RowGroup]]
    keys: list[Any]


def open_datasets(paths: Sequence[str | Path], pseudo: Sequence[str | Path] = ()) -> Datasets:
    """Read the manifests of datasets and the footers of their files.

    Args:
      paths: the datasets' folders.
      pseudo: further ones, after them, whose labels are of the same form but of students, at a temperature of their own.

    Raises:
      ValueError: there is none, one has no manifest, their specifications differ, or a file is not what was committed.
    """
    paths, own = [*paths, *pseudo], len(paths) or 1
    if not paths:
        raise ValueError("path must name at least one soft-label dataset, got none")
    manifests = [read_manifest(path) for path in paths]
    spec: SoftLabelSpec = manifests[0].spec
    for number, (path, manifest) in enumerate(zip(paths, manifests, strict=True)):
        there = manifest.spec
        if number >= own:
            there = replace(there, teacher=spec.teacher, temperature=spec.temperature)
        if differences := spec.differences(there):
            raise ValueError(
                f"soft labels that are read together must mean the same, {paths[0]} and {path} differ in "
                f"{' and '.join(differences)}"
            )
    with ThreadPoolExecutor(FOOTER_THREADS) as footers:
        opened = [list(footers.map(_shard, manifest.paths(), manifest.entries)) for manifest in manifests]
    keys = [[entry.key, entry.rows] for manifest in manifests for entry in manifest.entries]
    return Datasets(spec, _numbered(opened), keys)


def _shard(path: Path, entry: ManifestEntry) -> ShardFile:
    try:
        store = store_of(path)
        identity = store.identity(path)
        with _found_damage(path):
            metadata = pq.read_metadata(readable(path))
        _require_committed(path, "rows", metadata.num_rows, entry.rows)
        _require_committed(path, "bytes", identity[0], entry.bytes)
        if entry.footer and not store.by_request and footer_checksum(path) != entry.footer:
            raise _damaged(path, "its footer is not the one that was written")
    except FileNotFoundError as e:
        raise ValueError(f"{path} is missing, its manifest says that it was committed; label its rows again") from e
    return ShardFile(path, metadata, identity)


def _require_committed(path: Path, what: str, found: int, committed: int) -> None:
    if found != committed:
        raise ValueError(
            f"{path} must have the {committed:,} {what} that its manifest says, got {found:,}; it was changed after "
            "it was committed: label its rows again"
        )


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} is damaged ({reason}): its bytes changed after it was committed; take it out of the dataset and label its "
        "rows again, or put a copy back"
    )


@contextmanager
def _found_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (StoreError, FileNotFoundError):
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise _damaged(path, (str(e).splitlines() or [type(e).__name__])[0].rstrip(".")) from e


def _numbered(datasets: Sequence[Sequence[ShardFile]]) -> list[list[RowGroup]]:
    numbered, row = [], 0
    for files in datasets:
        groups: list[RowGroup] = []
        for file in files:
            for number in range(file.metadata.num_row_groups):
                rows = file.metadata.row_group(number).num_rows
                if rows:
                    groups.append(RowGroup(file, number, rows, row))
                row += rows
        numbered.append(groups)
    return numbered
