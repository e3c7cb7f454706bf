"""Rows of the pool that a student cannot read: left out of a choice, and listed with file, row and reason.

The score phase writes `unusable/<uid>.parquet` beside a unit's gains where it found some: `row` (int64, row of the unit), `file`,
`row_of_file` and `reason`. The driver gathers them into `unusable.jsonl` of the round, a line for each row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.pool.splits import Unit
from distilbeam.storage.atomic import replacing


def unusable_directory(gains: str | Path) -> Path:
    """Return the directory of the lists that belong to a directory of gains."""
    return Path(gains).with_name("unusable")


def unusable_list(gains: str | Path) -> Path:
    """Return the file of all rows that were found with a directory of gains."""
    return Path(gains).with_name("unusable.jsonl")


def unusable_table(unit: Unit, reasons: Mapping[int, str]) -> pa.Table:
    """Make the list of a unit from the reasons by row of the unit."""
    rows = sorted(reasons)
    columns = {
        "row": pa.array(rows, pa.int64()),
        "file": pa.array([unit.path] * len(rows), pa.string()),
        "row_of_file": pa.array([unit.first_row + row for row in rows], pa.int64()),
        "reason": pa.array([reasons[row] for row in rows], pa.string()),
    }
    return pa.table(columns)


def gather_unusable(gains: str | Path, units: Sequence[Unit]) -> list[dict[str, Any]]:
    """Write the list of all units, where a row was found; return it: `file`, `row` and `reason`."""
    directory = unusable_directory(gains)
    files = [file for unit in units if (file := directory / f"{unit.uid}.parquet").exists()]
    columns = ["file", "row_of_file", "reason"]
    found = [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]
    listed = [{"file": row["file"], "row": row["row_of_file"], "reason": row["reason"]} for row in found]
    if listed:
        with replacing(unusable_list(gains)) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in listed))
    return listed


def read_unusable(gains: str | Path) -> list[dict[str, Any]]:
    """Read what `gather_unusable` wrote; nothing where no row was found."""
    path = unusable_list(gains)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def unusable_sentence(rows: Sequence[Mapping[str, Any]], where: Path) -> str:
    """Say how many rows were left out, the first of them, and where all are."""
    first = rows[0]
    return (
        f"The student cannot read {len(rows):,} row(s) of the pool, which are left out; the first is row {first['row']:,} of "
        f"{first['file']}: {first['reason']}. All are in {where}"
    )
