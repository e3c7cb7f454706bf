"""Rows of a former report, kept beside new ones, so that a method or a dataset is added without computing the others.

A row belongs to a cell by what it says of it: dataset, teacher, seed, method and the study's options. What it does not say,
its sizes, trainings, settings and recipes, is in its column `basis`. Reports of before that column are of recipe 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.science.cells import Key, about_machine

Row = dict[str, Any]
FIRST_RECIPE = 1


def named(key: Key) -> Row:
    """Give what a row says of its cell."""
    return {name: value for name, value in key.items() if name not in ("settings", "recipe", "dataset_recipe", "about")}


def basis(key: Key) -> str:
    """Digest what a cell depends on beside its name: sizes and trainings, the teacher's settings, every recipe."""
    told = {name: key[name] for name in ("about", "settings")} | _recipes(key)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def beside_former(path: Path, rows: Sequence[Row], names: Sequence[str], today: Callable[[Row], Key]) -> list[Row]:
    """Put rows in the place of those that a former report has of the same cells; keep its others.

    Args:
      path: the former report's Parquet file.
      rows: of this call; a cell's rows are together the cell, whatever the former report has of it.
      names: columns that tell cells apart.
      today: from a former row to the key that its cell has in this version, its settings None if there is no such teacher.

    Returns:
      The former report's cells in its order, then the new ones.

    Raises:
      SystemExit: if there is no such report, or if a row that would be kept was made otherwise than this version makes it.
    """
    former, new = (_by_cell(found, names) for found in (_read(path, names), rows))
    for kept in (row for cell, found in former.items() if cell not in new for row in found):
        key = today(kept)
        if not _made_as_today(kept, key):
            raise SystemExit(
                f"--keep: {path.name} has rows of {kept['dataset']}, {kept['teacher']}, that were made with other settings "
                f"or recipes than today's; leave it out, or compute them anew"
            )
        kept["basis"] = basis(key)
    return [row for found in (former | new).values() for row in found]


def _read(path: Path, names: Sequence[str]) -> list[Row]:
    """Read a former report's rows, which must be of today's versions and have the columns that tell cells apart."""
    if not path.exists():
        raise SystemExit(f"--keep wants a former report, but there is no {path}; leave it out")
    table = pq.read_table(path)
    then, now = json.loads(table.schema.metadata[b"machine"])["packages"], about_machine()["packages"]
    for package in ("torch", "numpy"):
        if then[package] != now[package]:
            raise SystemExit(
                f"--keep: {path.name} was made with {package} {then[package]}, this is {now[package]}; leave it out, "
                f"or install that version"
            )
    if missing := set(names) - set(table.column_names):
        raise SystemExit(f"--keep: {path.name} has no column {', '.join(sorted(missing))}; leave it out")
    rows: list[Row] = table.to_pylist()
    return rows


def _made_as_today(row: Row, key: Key) -> bool:
    if "basis" in row:
        return bool(row["basis"] == basis(key))
    return key["settings"] is not None and set(_recipes(key).values()) == {FIRST_RECIPE}


def _recipes(key: Key) -> dict[str, int]:
    return {name: value for name, value in key.items() if name.endswith("recipe")}


def _by_cell(rows: Sequence[Row], names: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[name] for name in names), []).append(row)
    return cells
