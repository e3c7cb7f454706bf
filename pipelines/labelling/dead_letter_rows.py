"""The rows of the pool that are in the dead letters of a labelling job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.labelling.dead_letters import AGAIN, drop_answered, letters_table, write_letters
from distilbeam.pipelines.labelling.reconcile import Mask
from distilbeam.pipelines.labelling.shard_plan import Shard
from distilbeam.pipelines.pool.splits import Pool, Unit
from distilbeam.storage.paths import list_files, readable, remove_files


def any_letters(folder: Path) -> bool:
    """Tell whether there are dead letters, those that were set aside among them."""
    return bool(list_files(folder, "*.parquet") or list_files(folder / AGAIN, "*.parquet"))


def dead_rows(folder: Path, pool: Pool) -> dict[str, Mask]:
    """Find the rows of each unit that are in dead letters; a file that is another now has none.

    Args:
      folder: the dead letters.
      pool: the pool.
    """
    files = [*list_files(folder, "*.parquet"), *list_files(folder / AGAIN, "*.parquet")]
    if not files:
        return {}
    known = _units_by_path(pool)
    found: dict[str, Mask] = {}
    for file in files:
        for letter in pq.read_table(readable(file), partitioning=None).to_pylist():
            if (unit := _unit_of(known, letter)) is not None:
                found.setdefault(unit.uid, np.zeros(unit.rows, bool))[letter["row"] - unit.first_row] = True
    return found


def set_aside(folder: Path, shards: Sequence[Shard], pool: Pool, done: set[str]) -> None:
    """Set the dead letters of rows that are about to be asked aside; those of rows that have left the pool are removed.

    Args:
      folder: the dead letters; see `dead_letters`.
      shards: what is about to be asked.
      pool: the pool.
      done: keys of the committed shards.
    """
    drop_answered(folder, done)
    files = [*list_files(folder, "*.parquet"), *list_files(folder / AGAIN, "*.parquet")]
    if not files:
        return
    known = _units_by_path(pool)
    asked = _owners(shards, dead_rows(folder, pool))
    moved: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    rest: dict[Path, pa.Table] = {}
    for file in files:
        table = pq.read_table(readable(file), partitioning=None)
        stays = np.zeros(table.num_rows, bool)
        for i, letter in enumerate(table.to_pylist()):
            unit = _unit_of(known, letter)
            key = asked.get((unit.uid, letter["row"] - unit.first_row)) if unit is not None else None
            stays[i] = unit is not None and key is None
            if key is not None:
                same = moved.setdefault(key, {})
                before = same.get((letter["file"], letter["row"]), letter)
                same[letter["file"], letter["row"]] = max(before, letter, key=lambda one: one["attempts"])
        rest[file] = table.filter(pa.array(stays))
    targets = {folder / AGAIN / f"{key}.parquet": list(letters.values()) for key, letters in moved.items()}
    for path, letters in targets.items():
        write_letters(path, letters_table(letters), 1)
    for file, table in rest.items():
        if table.num_rows and table.num_rows < pq.read_metadata(readable(file)).num_rows and file not in targets:
            write_letters(file, table, 1)
    remove_files([file for file, table in rest.items() if not table.num_rows and file not in targets])


def _owners(shards: Sequence[Shard], dead: Mapping[str, Mask]) -> dict[tuple[str, int], str]:
    """Find the shard in which a dead row of a unit is asked."""
    owners: dict[tuple[str, int], str] = {}
    for shard in shards:
        for part in shard.parts:
            if part.unit.uid in dead:
                rows = part.numbers()
                owners |= {(part.unit.uid, row): shard.key for row in rows[dead[part.unit.uid][rows]].tolist()}
    return owners


def _units_by_path(pool: Pool) -> dict[str, list[Unit]]:
    found: dict[str, list[Unit]] = {}
    for unit in pool.units:
        found.setdefault(unit.path, []).append(unit)
    return found


def _unit_of(units: Mapping[str, list[Unit]], letter: Mapping[str, Any]) -> Unit | None:
    """Find the unit of a dead letter's row; letters of former versions do not name it."""
    for unit in units.get(letter["file"], ()):
        if unit.first_row <= letter["row"] < unit.first_row + unit.rows:
            return unit if letter.get("unit") in (None, unit.uid) else None
    return None
