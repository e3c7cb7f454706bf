"""Compare: find the rows whose key was met before, in the order of the sources.

Rows are spread over buckets by their key, so that the memory of a worker is bounded by the rows of a bucket (about 50 bytes
a row). The first row with a key stays. A later one is a duplicate if its content is the same, and a conflict (one id,
two contents) if not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.pipelines.ingest.committing import FilePerItem
from distilbeam.teacher.softlabels.atomic import replacing

BUCKET_ROWS = 4_000_000
_LOSER = np.dtype([("unit", "<i8"), ("row", "<i8"), ("conflict", "?")])


@dataclass(frozen=True)
class Compare(FilePerItem[int]):
    """The work of the compare phase: the losing rows of one bucket.

    Attributes:
      parts: the Arrow file of each unit, in the units' order.
      buckets: number of buckets.
      output: directory of the losers.
    """

    parts: tuple[str, ...]
    buckets: int
    output: str

    def __call__(self, bucket: int) -> None:
        """Find the bucket's losers and commit them."""
        found = [self._rows(unit, path, bucket) for unit, path in enumerate(self.parts)]
        keys = np.concatenate([rows[0] for rows in found])
        contents = np.concatenate([rows[1] for rows in found])
        places = np.concatenate([rows[2] for rows in found])
        with replacing(self.file(bucket)) as temporary, temporary.open("wb") as file:
            np.save(file, _losers(keys, contents, places))

    def name(self, bucket: int) -> str:
        """Name the bucket."""
        return f"rows of bucket {bucket} of {self.buckets}"

    def read(self, units: Sequence[int] | None = None) -> npt.NDArray[np.void]:
        """Read the losers of some units, or all: unit, row, conflict."""
        found = [np.load(self.file(bucket), mmap_mode="r") for bucket in range(self.buckets)]
        return np.concatenate([rows if units is None else rows[np.isin(rows["unit"], units)] for rows in found])

    def file(self, bucket: int) -> Path:
        """Return the file that commits the item."""
        return Path(self.output) / f"{bucket:06d}.npy"

    def _rows(self, unit: int, path: str, bucket: int) -> tuple[npt.NDArray[np.uint64], ...]:
        keys, contents = (_hashes(path, name) for name in ("_key", "_content"))
        here = np.flatnonzero(keys[:, 0] % np.uint64(self.buckets) == bucket)
        places = np.stack([np.full(len(here), unit), here], axis=1)
        return keys[here], contents[here], places


def _losers(
    keys: npt.NDArray[np.uint64], contents: npt.NDArray[np.uint64], places: npt.NDArray[np.int64]
) -> npt.NDArray[np.void]:
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: rows of one key stay in the order of the sources
    keys, contents, places = keys[order], contents[order], places[order]
    again = np.zeros(len(keys), bool)
    again[1:] = (keys[1:] == keys[:-1]).all(axis=1)
    first = np.maximum.accumulate(np.where(again, 0, np.arange(len(keys))))
    losers = np.zeros(int(again.sum()), _LOSER)
    losers["unit"], losers["row"] = places[again].T
    losers["conflict"] = (contents != contents[first]).any(axis=1)[again]
    return losers


def _hashes(path: str, column: str) -> npt.NDArray[np.uint64]:
    """View a column of 16-byte hashes as uint64 [n, 2] without reading the other columns."""
    with pa.memory_map(path) as file:
        reader = pa.ipc.open_file(file)
        index = reader.schema.get_field_index(column)
        batches: Iterable[pa.Array] = (reader.get_batch(i).column(index) for i in range(reader.num_record_batches))
        parts = [np.frombuffer(a.buffers()[1], "<u8", 2 * len(a), 16 * a.offset).reshape(-1, 2).copy() for a in batches]
    return np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)
