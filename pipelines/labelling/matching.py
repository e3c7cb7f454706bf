"""Matching by content: the rows without a label that ask what was answered already, and those that ask the same.

The rows without a label are read once; of each, what it asks (`questions`) and its id are held, about 60 bytes a row. The
shards are gone through one by one. Then

* a row whose question has an answer, in whatever shard, gets a copy of it;
* of rows that ask the same, one is asked;
* a row that is the same as another, id and question, is kept once; two that differ may not have one id;
* a label of a row that has left the pool is not kept beside one of the same id.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distilbeam.pipelines.labelling.label_rows import QUESTION, Labelling
from distilbeam.pipelines.labelling.questions import Digests, question_digests
from distilbeam.pipelines.labelling.reconcile import Mask, Stored
from distilbeam.pipelines.labelling.shard_plan import Part
from distilbeam.pipelines.pool.pool_types import cast_batches
from distilbeam.pipelines.pool.read_splits import DamagedFileError
from distilbeam.pipelines.pool.row_reader import RowReader
from distilbeam.pipelines.pool.splits import Pool, Unit
from distilbeam.storage.paths import readable

_READERS = 4


@dataclass(frozen=True)
class Rows:
    """Rows without a label.

    Attributes:
      parts: where they are, in the pool's order.
      ends: int64 [parts], number of rows up to the end of each part.
      questions: what they ask.
      ids: the user's ids of them, or digests of what is carried, as bytes; null where there is none.
    """

    parts: tuple[Part, ...]
    ends: npt.NDArray[np.int64]
    questions: Digests
    ids: pa.Array

    def place(self, row: int) -> tuple[Unit, int]:
        """Return the unit of a row and its row of the file."""
        i = int(np.searchsorted(self.ends, row, side="right"))
        part = self.parts[i]
        first = int(self.ends[i - 1]) if i else 0
        return part.unit, part.unit.first_row + int(part.numbers()[row - first])


@dataclass(frozen=True)
class Matches:
    """What was found.

    Attributes:
      shard: int64 [rows], the shard with the answer to a row's question, -1 where there is none.
      row: int64 [rows], the answer's row of that shard.
      same: bool [rows], rows that are kept once and are stored, or asked, elsewhere.
      waiting: bool [rows], rows that ask what an earlier one asks, which has no answer yet.
      stored: the shards, without labels of rows that are gone whose ids the pool has again.
      moved: for each shard, the row with the id of each of these, int64 [rows of the shard], -1 where there is none.
      present: bool [rows], rows with an id; the others are no questions of anybody's.
    """

    shard: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    same: Mask
    waiting: Mask
    stored: tuple[Stored, ...]
    moved: tuple[npt.NDArray[np.int64], ...]
    present: Mask

    @property
    def copied(self) -> Mask:
        """Rows whose answer is copied."""
        return (self.shard >= 0) & ~self.same & self.present


def read_rows_of(parts: Sequence[Part], columns: Sequence[str], labelling: Labelling) -> Rows:
    """Read what some rows ask, and their ids.

    Args:
      parts: where the rows are.
      columns: the columns that the teacher reads.
      labelling: how they would be labelled.
    """
    id_columns = [labelling.id_column] if labelling.id_column else list(labelling.spec.carried)
    read = tuple(dict.fromkeys([*columns, *id_columns]))
    grouped = [list(group) for _, group in groupby(parts, key=lambda part: part.unit.path)]

    def read_file(group: list[Part]) -> list[tuple[Digests, pa.Array]]:
        reader = RowReader(read, 65_536)
        return [
            one for _, unit in groupby(group, key=lambda part: part.unit.uid) for one in read_one(reader, list(unit))
        ]

    def read_one(reader: RowReader, group: list[Part]) -> list[tuple[Digests, pa.Array]]:
        numbers = np.concatenate([part.numbers() for part in group])
        batches = (batch for batch, _ in reader.read(group[0].unit, numbers))
        try:
            return [(question_digests(batch, columns), _ids(batch, labelling)) for batch in batches]
        except DamagedFileError:  # its worker will say so, and other files are labelled
            return [(np.zeros((len(numbers), 2), np.uint64), pa.nulls(len(numbers), pa.large_binary()))]

    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        found = [one for file in pool.map(read_file, grouped) for one in file]
    questions = np.concatenate([q for q, _ in found]) if found else np.empty((0, 2), np.uint64)
    ids = pa.concat_arrays([chunk for _, chunk in found]) if found else pa.array([], pa.large_binary())
    return Rows(tuple(parts), np.cumsum([part.rows for part in parts], dtype=np.int64), questions, ids)


def match(rows: Rows, stored: Sequence[Stored], columns: Sequence[str], pool: Pool, user_ids: bool) -> Matches:
    """Find answers to the questions of rows.

    Args:
      rows: the rows.
      stored: shards of the same teacher.
      columns: the columns that the teacher reads.
      pool: the pool, for the types of its columns and for errors.
      user_ids: whether the ids are the user's, which no two different rows may share.

    Returns:
      The matches.

    Raises:
      ValueError: two different rows have one id.
    """
    present = rows.ids.is_valid().to_numpy(zero_copy_only=False)
    group, first = _groups(rows.questions, present)
    same = _repeated(rows, group, user_ids)
    keys = rows.questions[first]
    shard, row = np.full(len(first), -1), np.zeros(len(first), np.int64)
    moved: list[npt.NDArray[np.int64]] = []
    for number, candidate in enumerate(stored):
        asked = _stored_questions(candidate, columns, pool)
        again = _with_ids_of(rows, candidate, user_ids, pool)
        moved.append(np.where(candidate.gone, again, -1))
        if asked is None:
            continue
        if user_ids:
            _require_same_question(rows, candidate, asked, again, pool)
        here = candidate.held & (again >= 0)
        here[here] = (asked[here] == rows.questions[again[here]]).all(axis=1)
        same[again[here]] = True
        found = _found(keys, asked)
        known = np.flatnonzero(found >= 0)
        shard[found[known]], row[found[known]] = number, known
    shard, row = shard[group], row[group]
    leads = np.zeros(len(group), bool)
    leads[first] = True
    waiting = (shard < 0) & ~leads & ~same & present
    kept = tuple(one.without(gone >= 0) for one, gone in zip(stored, moved, strict=True))
    return Matches(shard, row, same, waiting, kept, tuple(moved), present)


def _groups(questions: Digests, present: Mask) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Group equal questions, groups ascending: the group of each row, and the first row of each group."""
    order = np.lexsort((~present, questions[:, 1], questions[:, 0]))  # stable: of equal ones the first stays first
    ordered = questions[order]
    new = np.ones(len(order), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    group = np.empty(len(order), np.int64)
    group[order] = np.cumsum(new) - 1
    return group, order[new]


def _found(keys: Digests, asked: Digests) -> npt.NDArray[np.int64]:
    """Find each of some questions among sorted ones; -1 where it is not."""
    if not len(keys):
        return np.full(len(asked), -1)
    at = np.minimum(np.searchsorted(keys[:, 0], asked[:, 0]), len(keys) - 1)
    return np.where((keys[at] == asked).all(axis=1), at, -1)


def _repeated(rows: Rows, group: npt.NDArray[np.int64], user_ids: bool) -> Mask:
    """Tell which rows have the id and the question of an earlier one.

    Raises:
      ValueError: two rows have one id and differ.
    """
    codes = rows.ids.dictionary_encode()
    first = np.full(len(codes.dictionary) + 1, -1)
    code = codes.indices.fill_null(len(codes.dictionary)).to_numpy()
    first[code[::-1]] = np.arange(len(code))[::-1]
    lead = first[code]
    there = (code < len(codes.dictionary)) & (lead < np.arange(len(code)))
    differs = there & (group[lead] != group)
    if user_ids and differs.any():
        row = int(np.flatnonzero(differs)[0])
        raise _two_rows(rows.ids[row].as_py(), rows.place(int(lead[row])), rows.place(row))
    return np.asarray(there & ~differs)


def _with_ids_of(rows: Rows, shard: Stored, user_ids: bool, pool: Pool) -> npt.NDArray[np.int64]:
    """Find the row with the id of each of a shard's; -1 where there is none."""
    if not shard.kept.any():
        return np.full(shard.entry.rows, -1)
    if user_ids:
        ids = _as_binary(_read(shard, ["example_id"])["example_id"])
    else:
        digests = _stored_digests(shard, shard.entry.spec.carried, pool)
        if digests is None:
            return np.full(shard.entry.rows, -1)
        ids = _as_ids(digests)
    found = pc.index_in(ids, value_set=rows.ids, skip_nulls=True)
    return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64))


def _require_same_question(rows: Rows, shard: Stored, asked: Digests, again: npt.NDArray[np.int64], pool: Pool) -> None:
    both = np.flatnonzero(shard.held & (again >= 0))
    differs = (asked[both] != rows.questions[again[both]]).any(axis=1)
    if differs.any():
        row = int(both[np.flatnonzero(differs)[0]])
        part, number = shard.place(row)
        unit = next(unit for unit in pool.units if unit.uid == part.uid)
        other = int(again[row])
        raise _two_rows(rows.ids[other].as_py(), (unit, unit.first_row + number), rows.place(other))


def _two_rows(example_id: bytes, one: tuple[Unit, int], two: tuple[Unit, int]) -> ValueError:
    shown = example_id.decode(errors="backslashreplace")
    return ValueError(
        f"data.id: {shown!r} is the id of two rows that differ, row {one[1]:,} of {one[0].path} and row {two[1]:,} of "
        f"{two[0].path}; mend one of them, or leave data.id out, so that the content gives the id"
    )


def _stored_questions(shard: Stored, columns: Sequence[str], pool: Pool) -> Digests | None:
    """Digest what the rows of a shard asked; None where it does not say."""
    file = pq.ParquetFile(readable(shard.path))
    if QUESTION in file.schema_arrow.names:
        data = file.read([QUESTION])[QUESTION].combine_chunks()
        data = data.combine_chunks() if isinstance(data, pa.ChunkedArray) else data
        return np.frombuffer(data.buffers()[1], "<u8", 2 * len(data), 16 * data.offset).reshape(-1, 2)
    return _stored_digests(shard, columns, pool) if set(columns) <= set(shard.entry.spec.carried) else None


def _stored_digests(shard: Stored, columns: Sequence[str], pool: Pool) -> Digests | None:
    """Digest carried columns of a shard as the pool has them; None where they do not fit its types."""
    if not columns:
        return np.zeros((shard.entry.rows, 2), np.uint64)
    file = pq.ParquetFile(readable(shard.path))
    types = dict(pool.types)
    casts = [(name, types[name]) for name in columns if file.schema_arrow.field(name).type != types[name]]
    try:
        batches = list(
            cast_batches(file.iter_batches(65_536, columns=list(dict.fromkeys(columns))), casts, str(shard.path))
        )
    except ValueError:  # other values than the pool now has
        return None
    return np.concatenate([question_digests(batch, columns) for batch in batches])


def _read(shard: Stored, columns: Sequence[str]) -> pa.Table:
    return pq.read_table(readable(shard.path), columns=list(columns), partitioning=None)


def _ids(batch: pa.RecordBatch, labelling: Labelling) -> pa.Array:
    """Return the user's ids of rows, or digests of what is carried, as bytes; null where there is none."""
    rows = pa.Table.from_batches([batch])
    if labelling.id_column is None:
        return _as_ids(question_digests(rows, labelling.spec.carried))
    return example_ids(rows, labelling)


def example_ids(rows: pa.Table, labelling: Labelling) -> pa.Array:
    """Return the example ids that rows get, as bytes; null where a row has none."""
    if labelling.id_column is None:
        return _as_binary(labelling._ids(rows))
    present = rows[labelling.id_column].combine_chunks().is_valid()
    ids = _as_binary(labelling._ids(rows.filter(present)))
    if len(ids) == len(present):
        return ids
    numbers = pc.subtract(pc.cumulative_sum(present.cast(pa.int64())), 1)
    return ids.take(pc.if_else(present, numbers, pa.scalar(None, pa.int64())))


def _as_ids(digests: Digests) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(digests).tobytes())
    return pa.Array.from_buffers(pa.binary(16), len(digests), [None, data]).cast(pa.binary()).cast(pa.large_binary())


def _as_binary(ids: pa.Array | pa.ChunkedArray) -> pa.Array:
    array = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    return array.cast(pa.binary()).cast(pa.large_binary())
