"""Answers to a part of a shard's rows, kept until the shard is whole: what was paid outlives its process.

They belong to rows of units, so that they are found when the pool has grown and its shards are others. They are files in
the folder `_partial` of the dataset, which no reader follows, or among the user's temporary files where
the dataset takes none (a full disk). A file is the hash of what follows it, and an Arrow stream: the labelled rows with
their places in the shard, and in its metadata the rows that failed and what it cost.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.storage.atomic import replacing
from distilbeam.storage.paths import is_remote, list_files, read_bytes, remove_files, to_path
from distilbeam.storage.private_folders import own_folder

PartRows = tuple[str, int, int]  # id of a unit, first row, row after the last

FOLDER = "_partial"
PLACE = "distilbeam:place"  # int64, row of the shard
_SUFFIX = ".answers"
_FACTS = b"distilbeam.answers"
_HASH_BYTES = 16


@dataclass(frozen=True)
class Answered:
    """Labelled rows of a shard.

    Attributes:
      table: the labelled rows.
      places: int64, their rows in the shard, ascending.
      failures: rows without a label, with their `place`.
      costs: calls, requests and reused rows.
      parts: id of the unit, first row and row after the last of each part of the shard, in its order.
    """

    table: pa.Table
    places: npt.NDArray[np.int64]
    failures: list[dict[str, Any]]
    costs: dict[str, int]
    parts: tuple[PartRows, ...] = ()

    def of_shard(self, parts: Sequence[PartRows]) -> Answered | None:
        """Return the answers to rows of a shard, which may be another one, with their places there; None for none."""
        if tuple(parts) == self.parts:
            return self
        there = np.full(sum(stop - start for _, start, stop in self.parts), -1)
        for first, uid, start, stop in _placed(self.parts):
            for own_first, own_uid, own_start, own_stop in _placed(parts):
                lo, hi = max(start, own_start), min(stop, own_stop)
                if uid == own_uid and lo < hi:
                    there[first + lo - start : first + hi - start] = own_first + np.arange(
                        lo - own_start, hi - own_start
                    )
        places = there[self.places]
        rows = np.flatnonzero(places >= 0)
        failures = [{**f, "place": int(there[f["place"]])} for f in self.failures if there[f["place"]] >= 0]
        if not len(rows) and not failures:
            return None
        rows = rows[np.argsort(places[rows])]
        return Answered(self.table.take(rows), places[rows], failures, {}, tuple(parts))


def save(dataset: str, key: str, spec: str, parts: Sequence[PartRows], answered: Sequence[Answered]) -> None:
    """Write answers to rows of a shard.

    Args:
      dataset: directory of the soft-label dataset.
      key: key of the shard.
      spec: the specification of the labels, as JSON.
      parts: the shard's parts, as in `Answered`.
      answered: the answers.

    Raises:
      OSError: neither the dataset nor the temporary files take them.
    """
    data = _packed(answered, spec, parts)
    name = f"{key}-{hashlib.blake2b(data, digest_size=8).hexdigest()}{_SUFFIX}"
    try:
        _write(to_path(dataset) / FOLDER / name, data)
    except OSError:
        spill = _spill(dataset, make=True)
        if spill is None:
            raise
        _write(spill / name, data)


def saved(dataset: str, spec: str | None) -> list[Answered]:
    """Read all answers of a specification that were saved, None for any; damaged files are passed over."""
    found = []
    for path in _files(dataset, ""):
        with suppress(OSError, ValueError, KeyError, pa.ArrowException):
            found.append(_unpacked(read_bytes(path), spec))
    return found


def rows_saved(dataset: str, spec: str, shards: Iterable[Sequence[PartRows]]) -> int:
    """Count the rows of shards, given by their parts, about which nothing is asked any more."""
    answers = saved(dataset, spec) if has_saved(dataset) else []
    known = 0
    for parts in shards if answers else ():
        places: set[int] = set()
        for found in filter(None, (answered.of_shard(parts) for answered in answers)):
            places |= {*found.places.tolist(), *(failure["place"] for failure in found.failures)}
        known += len(places)
    return known


def forget(dataset: str, keys: Sequence[str]) -> None:
    """Remove the answers of shards that are committed."""
    for key in keys:
        remove_files(_files(dataset, key))


def forget_all(dataset: str) -> None:
    """Remove all answers: every row is committed."""
    remove_files(_files(dataset, ""))


def has_saved(dataset: str) -> bool:
    """Tell whether there are any answers."""
    return bool(_files(dataset, ""))


def tidy(dataset: str) -> None:
    """Remove the folders that are empty."""
    for folder in (to_path(dataset) / FOLDER, to_path(dataset), _spill(dataset, make=False)):
        if folder is not None and not is_remote(folder):
            with suppress(OSError):
                folder.rmdir()


def _files(dataset: str, key: str) -> list[Path]:
    folders = [to_path(dataset) / FOLDER, _spill(dataset, make=False)]
    return sorted(path for folder in folders if folder is not None for path in list_files(folder, f"{key}*{_SUFFIX}"))


def _spill(dataset: str, *, make: bool) -> Path | None:
    own = own_folder("spill", make=make)
    if own is None:
        return None
    where = str(to_path(dataset).resolve())
    folder = own / hashlib.blake2b(where.encode(), digest_size=8).hexdigest()
    if make:
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _placed(parts: Sequence[PartRows]) -> Iterator[tuple[int, str, int, int]]:
    first = 0
    for uid, start, stop in parts:
        yield first, uid, start, stop
        first += stop - start


def _packed(answered: Sequence[Answered], spec: str, parts: Sequence[PartRows]) -> bytes:
    tables = [
        part.table.append_column(PLACE, pa.array(part.places, pa.int64()))
        for part in answered
        if part.table.num_columns
    ]
    costs: dict[str, int] = {}
    for part in answered:
        costs = {name: costs.get(name, 0) + count for name, count in part.costs.items()}
    facts = {
        "failures": [_as_json(f) for part in answered for f in part.failures],
        "costs": costs,
        "spec": spec,
        "parts": parts,
    }
    table = pa.concat_tables(tables) if tables else pa.table({PLACE: pa.array([], pa.int64())})
    former = table.schema.metadata or {}
    table = table.replace_schema_metadata({**former, _FACTS: json.dumps(facts)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return hashlib.blake2b(data, digest_size=_HASH_BYTES).digest() + data


def _unpacked(data: bytes, spec: str | None) -> Answered:
    if hashlib.blake2b(data[_HASH_BYTES:], digest_size=_HASH_BYTES).digest() != data[:_HASH_BYTES]:
        raise ValueError("the answers are damaged")
    table = pa.ipc.open_stream(pa.py_buffer(data[_HASH_BYTES:])).read_all()
    metadata = dict(table.schema.metadata)
    facts = json.loads(metadata.pop(_FACTS))
    if spec is not None and facts["spec"] != spec:
        raise ValueError("the answers are of another teacher, or labels of another form")
    places = table[PLACE].to_numpy()
    labelled = table.drop_columns([PLACE]).replace_schema_metadata(metadata or None)
    failures = [_from_json(failure) for failure in facts["failures"]]
    return Answered(labelled, places, failures, facts["costs"], tuple((u, a, b) for u, a, b in facts["parts"]))


def _as_json(failure: dict[str, Any]) -> dict[str, Any]:
    ids = failure["example_id"]
    return {**failure, "example_id": {"hex": ids.hex()} if isinstance(ids, bytes) else ids}


def _from_json(failure: dict[str, Any]) -> dict[str, Any]:
    ids = failure["example_id"]
    return {**failure, "example_id": bytes.fromhex(ids["hex"]) if isinstance(ids, dict) else ids}
