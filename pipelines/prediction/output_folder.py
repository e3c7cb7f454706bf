"""The folder of predictions: Parquet files of consecutive rows of one file of examples, and what says that none is missing.

    OUT/_predict.json            what predicts, and what is kept; it is written first
    OUT/_sources/KEY.json        a file of examples: path, size, time of change; its number of rows when all are predicted
    OUT/NAME-KEY-FIRSTROW.parquet

Every file appears whole, by one rename. What is done is what is there: a file of examples goes on behind its last row that has
no gap before it. Names that begin with an underscore are passed over by readers of the folder.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.pipelines.ingest.sources import Source
from distilbeam.storage.files import read_json, sweep, write_json, write_parquet

FORMAT_VERSION = 1
PLACES = ("source_file", "source_row")


class OutputFolder:
    """Predictions of some files by one model.

    Args:
      root: the folder, which is there and is held.
      about: what predicts and what is kept, plain data; it must be what the folder was begun with.

    Raises:
      ValueError: the folder holds other things, or predictions of another model or with other columns.
    """

    def __init__(self, root: Path, about: Mapping[str, Any]) -> None:
        self.root, self._description = root, root / "_predict.json"
        about = {"format_version": FORMAT_VERSION, **about}
        sweep(root)
        begun = self._description.exists()
        if begun and not any(root.glob("*.parquet")):  # of a call that was refused, which others need not go on with
            shutil.rmtree(root / "_sources", ignore_errors=True)
            write_json(self._description, about)
        elif begun:
            found = read_json(self._description)
            differing = [name for name, value in about.items() if found.get(name) != value]
            if differing:
                raise ValueError(
                    f"--out: {root} holds predictions that differ in {', '.join(differing)}; name another folder, or remove it to "
                    "predict everything again"
                )
        else:
            strangers = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
            if strangers:
                raise ValueError(f"--out: {root} holds other files ({', '.join(strangers[:3])}); name a new folder")
            write_json(self._description, about)

    def begin(self, source: Source) -> tuple[int | None, bool]:
        """Take up a file of examples; what was predicted of another content under its path is removed.

        Returns:
          The row to go on from, None where nothing is left; and whether its content was another one.
        """
        state, identity = self._state(source), _identity(source)
        former = read_json(state) if state.exists() else None
        changed = former is not None and {name: former[name] for name in identity} != identity
        if changed:
            for part in self._parts(source):
                part.unlink()
        if former is None or changed:
            write_json(state, {**identity, "rows": None})
        start = 0
        for part in self._parts(source):
            if int(part.stem.rpartition("-")[2]) != start:
                part.unlink()  # behind a gap, which is predicted again with what follows
            else:
                start += pq.read_metadata(part).num_rows
        done = former is not None and not changed and former["rows"] == start
        return (None if done else start), changed

    def write(self, source: Source, first: int, table: pa.Table, images: Sequence[str] = ()) -> None:
        """Commit the predictions of consecutive rows, the first of which has this number; of images, each is a file of one row."""
        rows = pa.array([0] * len(images) if images else range(first, first + table.num_rows), pa.int64())
        file = pa.array(images or [source.path] * table.num_rows, pa.string())
        placed = table.add_column(0, PLACES[1], rows).add_column(0, PLACES[0], file)
        write_parquet(self.root / f"{_stem(source)}-{first:012d}.parquet", placed)

    def finish(self, source: Source, rows: int) -> None:
        """Take note that all rows of a file are predicted."""
        write_json(self._state(source), {**_identity(source), "rows": rows})

    def schema(self) -> pa.Schema | None:
        """Return the columns of the files that are there, without those that `write` adds; None where there is none."""
        first = next(iter(sorted(self.root.glob("*.parquet"))), None)
        if first is None:
            return None
        schema = pq.read_schema(first)
        return pa.schema([field for field in schema if field.name not in PLACES])

    def gone(self, sources: Sequence[Source]) -> list[str]:
        """List the files of examples whose predictions are here and that are not named any more."""
        named = {self._state(source) for source in sources}
        return [read_json(path)["source"] for path in sorted(self.root.glob("_sources/*.json")) if path not in named]

    def counts(self, sources: Sequence[Source]) -> tuple[int, int, dict[str, Any] | None]:
        """Count the rows of files and those without a prediction; and give file, row and reason of the first of these."""
        rows, without, first = 0, 0, None
        for part in (part for source in sources for part in self._parts(source)):
            metadata = pq.read_metadata(part)
            rows += metadata.num_rows
            missing = metadata.num_rows - _nulls(metadata, "reason")
            without += missing
            if missing and first is None:
                first = next(_with_reason(part))
        return rows, without, first

    def _parts(self, source: Source) -> list[Path]:
        return sorted(path for path in self.root.glob("*.parquet") if path.stem.rpartition("-")[0] == _stem(source))

    def _state(self, source: Source) -> Path:
        return self.root / "_sources" / f"{_key(source)}.json"


def _identity(source: Source) -> dict[str, Any]:
    return {"source": source.path, "bytes": source.bytes, "mtime_ns": source.mtime_ns}


def _key(source: Source) -> str:
    return hashlib.blake2b(source.path.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


def _stem(source: Source) -> str:
    name = re.sub(r"[^\w.=-]", "_", source.name.partition(".")[0] or "rows").strip("_.-") or "rows"
    return f"{name[:80]}-{_key(source)}"


def _nulls(metadata: pq.FileMetaData, column: str) -> int:
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    place = names.index(column)
    return sum(metadata.row_group(i).column(place).statistics.null_count for i in range(metadata.num_row_groups))


def _with_reason(part: Path) -> Iterator[dict[str, Any]]:
    for row in pq.read_table(part, columns=[*PLACES, "reason"]).to_pylist():
        if row["reason"] is not None:
            yield row
