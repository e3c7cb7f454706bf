"""Files that appear whole or not at all: written under a temporary name, flushed to disk, renamed.

A temporary name carries a random suffix, so that two writers of the same file never share one; what a killed process left
behind is swept when its run is opened again.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_MARK = ".tmp-"


@contextmanager
def committed_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well, remove it when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_MARK}{secrets.token_hex(6)}-{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def committed_directory(path: Path) -> Iterator[Path]:
    """Yield a new temporary directory beside `path`; rename it to `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_MARK}{secrets.token_hex(6)}-{path.name}")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, whole or not at all."""
    with committed_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; `ValueError` names a damaged one."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not the JSON that was written there ({e}); remove it to have it made again") from e


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a small table as Parquet, whole or not at all."""
    with committed_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def sweep(directory: Path) -> int:
    """Remove what writers that were killed left under temporary names; return how many there were."""
    left = [p for p in directory.rglob(f"{_MARK}*")]
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return len(left)
