"""Dead letters: the rows that have no label, with why, and asking about them again.

Each shard's are a Parquet file under its key. Before they are asked again they are set aside in the folder `again`, under
the key of the shard that their labels will be; what fails once more is written anew, with the attempts added up, and what
is set aside is removed when that shard is committed. A crash at any moment loses no row and asks for no label twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.acquisition.score import picks_file
from distilbeam.pipelines.labelling.shard_plan import Part, Shard, Task, range_bytes, shard_key
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.storage.files import write_parquet
from distilbeam.storage.paths import list_files, readable, remove_files
from distilbeam.teacher.softlabels import SoftLabelSpec

AGAIN = "again"
_PREFIX = "again_"  # of the keys of shards of rows that had failed before
_ANSWERED = b"distilbeam.answered"
_MESSAGE = 300  # characters of a message, in a sentence


def letters_table(letters: Sequence[dict[str, Any]]) -> pa.Table:
    """Lay dead letters out as a table; ids that are all missing are text."""
    table = pa.Table.from_pylist(list(letters))
    ids = table.schema.get_field_index("example_id")
    if pa.types.is_null(table.schema.field(ids).type):
        table = table.set_column(ids, "example_id", table["example_id"].cast(pa.string()))
    return table


def write_letters(path: Path, letters: pa.Table, answered: int) -> None:
    """Write a shard's dead letters, with the number of its rows that have a label."""
    write_parquet(path, letters.replace_schema_metadata({_ANSWERED: str(answered)}))


def none_answered(path: Path) -> bool:
    """Tell whether no row of the shard has a label."""
    return bool((pq.read_metadata(readable(path)).metadata or {}).get(_ANSWERED) == b"0")


def count_letters(directory: Path) -> int:
    """Return the number of rows in a directory of dead letters, those that are being asked again among them."""
    return sum(pq.read_metadata(readable(path)).num_rows for path in [*_files(directory), *_files(directory / AGAIN)])


def attempts_before(directory: Path, key: str) -> dict[tuple[str, int], int]:
    """Return how often the rows of a shard were asked about before, by file and row."""
    path = directory / AGAIN / f"{key}.parquet"
    try:
        table = pq.read_table(readable(path), columns=["file", "row", "attempts"], partitioning=None)
    except FileNotFoundError:
        return {}
    return {(row["file"], row["row"]): row["attempts"] for row in table.to_pylist()}


def commonest(directory: Path) -> tuple[int, str]:
    """Return the commonest error of the dead letters, and how many rows have it; the first of equals."""
    counts: Counter[str] = Counter()
    for path in sorted(_files(directory)):
        counts.update(pq.read_table(readable(path), columns=["error"], partitioning=None)["error"].to_pylist())
    if not counts:
        return 0, ""
    error, count = counts.most_common(1)[0]
    return count, error if len(error) <= _MESSAGE else error[: _MESSAGE - 1] + "…"


def none_answered_sentence(directory: Path, rows: int) -> str:
    """Say that none of the rows has a label, and why most of them have none."""
    count, error = commonest(directory)
    return (
        f"the teacher answered none of the {rows:,} rows asked, {count:,} of them with: {error}; mend the teacher or the "
        f"rows and start again, which asks them again. Every row's error is in {directory}"
    )


def ask_again(
    directory: Path, units: Sequence[Unit], picks: str | None, shard_rows: int, spec: SoftLabelSpec, done: set[str]
) -> list[Task]:
    """Set dead letters aside and plan the shards that their rows will be.

    Args:
      directory: the dead letters; their dataset is held by this process.
      units: the pool's units.
      picks: directory of the picks, or None where every row is labelled.
      shard_rows: most rows in a shard.
      spec: the label specification.
      done: keys of the committed shards.

    Returns:
      A task for each shard. Shards of which every row failed are not among them: they are planned like those that were
      never asked.
    """
    drop_answered(directory, done)
    for path in _files(directory):
        if path.stem not in done and not (none_answered(path) and is_of_again(path.stem)):
            if none_answered(path):
                write_letters(directory / AGAIN / path.name, _read(path), 0)
            remove_files([path])  # else what a killed process wrote of a shard that is asked about again
    files = [*_files(directory), *(path for path in _files(directory / AGAIN) if not none_answered(path))]
    located = _located([_read(path) for path in files], units)
    tasks, kept = [], set()
    for start in range(0, len(located), shard_rows):
        chunk = located[start : start + shard_rows]
        shard = _shard(chunk, picks, spec)
        target = directory / AGAIN / f"{shard.key}.parquet"
        write_letters(target, letters_table([letter for _, _, letter in chunk]), 1)
        kept.add(target)
        tasks.append(Task((shard,)))
    remove_files([path for path in files if path not in kept])
    return tasks


def is_of_again(key: str) -> bool:
    """Tell whether a shard is of rows that had failed before, which are planned from their dead letters alone."""
    return key.startswith(_PREFIX)


def leave(directory: Path, done: set[str]) -> None:
    """Leave the dead letters alone: put back those of shards of which every row failed, so that these are not asked."""
    drop_answered(directory, done)
    for path in _files(directory / AGAIN):
        if none_answered(path):
            write_letters(directory / path.name, _read(path), 0)
            remove_files([path])


def drop_answered(directory: Path, done: set[str]) -> None:
    """Remove what was set aside and has been asked again: its shard is among the committed, or all of it failed again."""
    written = {path.stem for path in _files(directory) if none_answered(path)}
    remove_files([path for path in _files(directory / AGAIN) if path.stem in done | written])


def runs(rows: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """List the runs of neighbours in ascending numbers, as first and the one after the last."""
    if len(rows):
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            yield int(run[0]), int(run[-1]) + 1


def _files(directory: Path) -> list[Path]:
    return list_files(directory, "*.parquet")


def _read(path: Path) -> pa.Table:
    return pq.read_table(readable(path), partitioning=None)


def _located(letters: Sequence[pa.Table], units: Sequence[Unit]) -> list[tuple[Unit, int, dict[str, Any]]]:
    """Find the units of dead letters and their rows there, in the pool's order, each row once."""
    by_file: dict[str, list[Unit]] = {}
    for unit in units:
        by_file.setdefault(unit.path, []).append(unit)
    found: dict[tuple[int, int], tuple[Unit, int, dict[str, Any]]] = {}
    for letter in (row for table in letters for row in table.to_pylist()):
        for unit in by_file.get(letter["file"], ()):
            same = letter.get("unit") in (None, unit.uid)  # former versions did not write it
            if same and unit.first_row <= letter["row"] < unit.first_row + unit.rows:
                row = letter["row"] - unit.first_row
                known = found.get((unit.pool_row, row))
                if known is None or known[2]["attempts"] < letter["attempts"]:
                    found[unit.pool_row, row] = unit, row, letter
    return [found[place] for place in sorted(found)]


def _shard(rows: Sequence[tuple[Unit, int, dict[str, Any]]], picks: str | None, spec: SoftLabelSpec) -> Shard:
    """Make one shard of rows of units, in their order."""
    parts: list[Part] = []
    for _, group in groupby(rows, key=lambda row: row[0].pool_row):
        same = list(group)
        unit, own = same[0][0], np.array([row for _, row, _ in same], np.int64)
        if picks is not None:  # a part counts within what was chosen of the unit
            own = np.searchsorted(pq.read_table(picks_file(picks, unit), columns=["row"])["row"].to_numpy(), own)
        parts += [Part(unit, start, stop) for start, stop in runs(own)]
    key = shard_key([(part.unit.uid, range_bytes(part.start, part.stop)) for part in parts], spec)
    return Shard(f"{_PREFIX}{key}", tuple(parts))
