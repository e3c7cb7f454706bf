"""JSON and Parquet files that appear whole or not at all, and the sweeping of what killed writers left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.storage.atomic import replacing
from distilbeam.storage.paths import read_texts


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file of ours; `ValueError` names a damaged one."""
    try:
        return json.loads(read_texts([path])[0])
    except json.JSONDecodeError as e:
        raise ValueError(f"{path} is not the JSON that was written there ({e}); remove it to have it made again") from e


def write_parquet(path: Path, table: pa.Table, *, flushed: bool = True) -> None:
    """Write a small table as Parquet, whole or not at all; `flushed` as for `replacing`."""
    with replacing(path, flushed=flushed) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def sweep(directory: Path) -> int:
    """Remove what writers that were killed left under temporary names; return how many there were."""
    left = list(directory.rglob(".*.tmp"))
    for path in left:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return len(left)
