"""Digests of what is in a run's files: of the bytes of every row group's columns, which no other content has.

A footer does not change with every value: pyarrow writes the same one after a vector was corrected. Each row group that is read
is hashed (SHA-256, about 1.5 GB/s for each of a few threads) once: digests are kept by the file's size, time of change and inode.
An object store names a version for each content, so that nothing is read.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from distilbeam.pipelines.pool.splits import Pool
from distilbeam.storage.files import read_json, write_json
from distilbeam.storage.stores import store_of

_STATE = 3  # entries of a state that count: the machine does not
_READ_BYTES = 2**20
_READERS = 4


def content_digests(pool: Pool, cache: Path, check_all: bool = False) -> dict[str, str]:
    """Digest the files of a pool: the columns that are read.

    Args:
      pool: the plan.
      cache: JSON file in which digests are kept.
      check_all: hash files too that are what they were by size, time and inode.

    Returns:
      A digest by the name of each file.
    """
    kept: dict[str, Any] = read_json(cache) if cache.exists() else {}
    columns, paths, states = [name for name, _ in pool.types], dict(pool.paths), dict(pool.states)
    about = hashlib.blake2b("\n".join(columns).encode(), digest_size=8).hexdigest()

    def digest(name: str) -> list[str]:
        path, state = paths[name], list(states[name][:_STATE])
        if store_of(path).by_request:  # its version tells what it holds
            return [str(part) for part in state]
        known = kept.get(f"{about}|{path}")
        if known is None or known["state"] != state or check_all:
            return _row_groups(path, set(columns))
        return list(known["groups"])

    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as readers:
        found = dict(zip(paths, readers.map(digest, paths), strict=True))
    now = {f"{about}|{paths[n]}": {"state": list(states[n][:_STATE]), "groups": found[n]} for n in paths}
    if any(kept.get(key) != value for key, value in now.items()):
        write_json(cache, {**kept, **now})
    return {name: hashlib.sha256("\n".join(groups).encode()).hexdigest()[:32] for name, groups in found.items()}


def _row_groups(path: str, columns: set[str]) -> list[str]:
    metadata = pq.read_metadata(path)
    digests = []
    with Path(path).open("rb") as file:
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            digest = hashlib.sha256(str(group.num_rows).encode())
            for i in range(group.num_columns):
                chunk = group.column(i)
                if chunk.path_in_schema.partition(".")[0] in columns:
                    file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
                    left = chunk.total_compressed_size
                    while left and (data := file.read(min(left, _READ_BYTES))):
                        digest.update(data)
                        left -= len(data)
            digests.append(digest.hexdigest()[:32])
    return digests
