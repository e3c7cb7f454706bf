"""Files compared with their labels: rows beside the ids and columns that are stored with the labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distilbeam.pipelines.labelling.label_rows import QUESTION, Labelling
from distilbeam.pipelines.labelling.matching import example_ids
from distilbeam.pipelines.labelling.questions import question_digests
from distilbeam.pipelines.labelling.reconcile import LabelledPart, labelled_parts
from distilbeam.pipelines.pool.row_ranges import from_ranges, to_ranges
from distilbeam.pipelines.pool.row_reader import RowReader
from distilbeam.pipelines.pool.splits import Pool, Unit
from distilbeam.storage.paths import readable
from distilbeam.teacher.softlabels import ManifestEntry


def changed_files(
    pool: Pool, names: Sequence[str], dataset: Path, entries: Sequence[ManifestEntry], labelling: Labelling
) -> list[str]:
    """Find the files of which a labelled row is no longer what it was.

    Args:
      pool: the pool.
      names: the files to look at.
      dataset: the labels.
      entries: their shards.
      labelling: how they were labelled.
    """
    if not names:
        return []
    paths = dict(pool.paths)
    looked_at = {paths[name]: name for name in names}
    units = {unit.uid: unit for unit in pool.units if unit.path in looked_at}
    changed: set[str] = set()
    for entry in entries:
        first = 0
        for part in labelled_parts(entry):
            unit = units.get(part.uid)
            if unit is not None and part.rows and not _holds(dataset / entry.path, first, part, unit, labelling):
                changed.add(looked_at[unit.path])
            first += part.rows
    return [name for name in names if name in changed]


def find_rows(shard: Path, first: int, part: LabelledPart, unit: Unit, labelling: Labelling) -> tuple[int, ...] | None:
    """Find which rows of a unit a part of a shard has, by their ids; None where they are not there."""
    stored = pq.read_table(readable(shard), columns=["example_id"], partitioning=None).slice(first, part.rows)
    rows = np.arange(part.start, part.stop)
    ids = example_ids(_pool_rows(unit, rows, labelling), labelling)
    found = pc.index_in(stored["example_id"].cast(pa.binary()).cast(pa.large_binary()), value_set=ids)
    if found.null_count:
        return None
    numbers = np.sort(found.to_numpy())
    return to_ranges(rows[numbers]) if len(np.unique(numbers)) == part.rows else None


def _holds(shard: Path, first: int, part: LabelledPart, unit: Unit, labelling: Labelling) -> bool:
    """Tell whether the rows of a part are still what was labelled."""
    ranges = part.ranges or find_rows(shard, first, part, unit, labelling)
    if ranges is None:
        return False
    carried = labelling.spec.carried
    names = ["example_id", *carried, *([QUESTION] if labelling.question else [])]
    file = pq.ParquetFile(readable(shard))
    stored = file.read([name for name in names if name in file.schema_arrow.names]).slice(first, part.rows)
    rows = _pool_rows(unit, from_ranges(ranges), labelling)
    ids = stored["example_id"].cast(pa.binary()).cast(pa.large_binary()).combine_chunks()
    if not _equal(example_ids(rows, labelling), ids):
        return False
    if QUESTION in stored.column_names:
        said = np.frombuffer(b"".join(stored[QUESTION].to_pylist()), "<u8").reshape(-1, 2)
        if not np.array_equal(said, question_digests(rows, labelling.question)):
            return False
    try:
        return all(_equal(rows[name], stored[name].cast(rows[name].type)) for name in carried)
    except pa.ArrowException:
        return False


def _pool_rows(unit: Unit, rows: np.ndarray, labelling: Labelling) -> pa.Table:
    id_column = [labelling.id_column] if labelling.id_column else []
    columns = tuple(dict.fromkeys([*id_column, *labelling.spec.carried, *labelling.question]))
    return pa.Table.from_batches([batch for batch, _ in RowReader(columns, 65_536).read(unit, rows)])


def _equal(one: pa.Array | pa.ChunkedArray, two: pa.Array | pa.ChunkedArray) -> bool:
    arrays = [a if isinstance(a, pa.ChunkedArray) else pa.chunked_array([a]) for a in (one, two)]
    return bool(arrays[0].equals(arrays[1]))
