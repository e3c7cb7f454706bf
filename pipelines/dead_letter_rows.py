"""Which rows of the pool are in the dead letters of a labelling job."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.contents import Contents
from distilbeam.pipelines.files import write_parquet
from distilbeam.pipelines.growth import Mask
from distilbeam.pipelines.units import Pool, Unit
from distilbeam.teacher.softlabels.places import list_files, readable, remove_files


def dead_rows(folder: Path, pool: Pool, contents: Contents) -> dict[str, Mask]:
    """Find the rows of each unit that are in dead letters; a file that is another now has none.

    Args:
      folder: the dead letters.
      pool: the pool.
      contents: what was known of its files when the letters were written.
    """
    files = list_files(folder, "*.parquet")
    if not files:
        return {}
    known = _units_by_path(pool, contents)
    found: dict[str, Mask] = {}
    for file in files:
        letters = pq.read_table(readable(file), columns=["file", "row"], partitioning=None)
        for path, row in zip(letters["file"].to_pylist(), letters["row"].to_pylist(), strict=True):
            if (unit := _unit_of(known.get(path, []), row)) is not None:
                found.setdefault(unit.uid, np.zeros(unit.rows, bool))[row - unit.first_row] = True
    return found


def forget_letters(folder: Path, pool: Pool, keep: Mapping[str, Mask]) -> None:
    """Remove the dead letters of all rows but some of the pool's."""
    units = _units_by_path(pool, None)
    gone: list[Path] = []
    for file in list_files(folder, "*.parquet"):
        if not keep:
            gone.append(file)
            continue
        letters = pq.read_table(readable(file), partitioning=None)
        places = zip(letters["file"].to_pylist(), letters["row"].to_pylist(), strict=True)
        kept = [_is_kept(_unit_of(units.get(path, []), row), row, keep) for path, row in places]
        if not any(kept):
            gone.append(file)
        elif not all(kept):
            write_parquet(file, letters.filter(pa.array(kept)))
    remove_files(gone)


def _units_by_path(pool: Pool, contents: Contents | None) -> dict[str, list[Unit]]:
    names, digests = {path: name for name, path in pool.paths}, dict(pool.files)
    found: dict[str, list[Unit]] = {}
    for unit in pool.units:
        known = contents.files.get(names[unit.path]) if contents is not None else None
        if known is None or known.footer == digests[names[unit.path]]:
            found.setdefault(unit.path, []).append(unit)
    return found


def _unit_of(units: list[Unit], row: int) -> Unit | None:
    return next((unit for unit in units if unit.first_row <= row < unit.first_row + unit.rows), None)


def _is_kept(unit: Unit | None, row: int, keep: Mapping[str, Mask]) -> bool:
    return unit is not None and unit.uid in keep and bool(keep[unit.uid][row - unit.first_row])
