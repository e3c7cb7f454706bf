"""Write shards until killed; a program of its own.

    python write_shards.py DATASET

Takes the only shard of a dataset and commits it again and again under new keys. Prints a line after each.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pyarrow.parquet as pq

from distilbeam.teacher.softlabels import read_manifest, write_shard


def main(directory: Path) -> None:
    found = read_manifest(directory)
    (path,) = found.paths()
    table = pq.read_table(path)
    assert found.spec is not None
    for i in itertools.count():
        write_shard(directory, f"s{i}", table, found.spec, f"k{i}")
        print(i, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
