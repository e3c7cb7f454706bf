"""The encode phase: what a sentence encoder says of rows of the pool, beside what the student reads of them, per unit.

A unit's file `<uid>.parquet` has the columns `places` and `weights` (lists: the student's bag of a row, without its zeros) and
`vector` (float32 [m]) for the rows that are drawn, that the student can read, and whose vector is finite. The teacher is not
asked; what is committed is not encoded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from distilbeam.inputs.columns import without_dictionaries
from distilbeam.inputs.config import InputConfig, InputError, MakeInput, make_input, padding_id, vocabulary_size
from distilbeam.pipelines.acquisition.score import UnitFiles
from distilbeam.pipelines.engine.counters import count, timed
from distilbeam.pipelines.pool.row_reader import RowReader
from distilbeam.pipelines.pool.splits import Unit
from distilbeam.selection.rounding import shard_rng
from distilbeam.storage.atomic import temporary_name
from distilbeam.student.data.sentence_encoder import SentenceEncoder
from distilbeam.student.data.usable_rows import find_usable
from distilbeam.student.networks.config import EncoderConfig
from distilbeam.student.networks.encoder_table import id_bags, vector_bags

ENCODED_AT_ONCE = 64  # texts that the encoder reads together
_BAG = ("places", "weights")


@dataclass(frozen=True)
class EncodeTexts(UnitFiles):
    """The work of the encode phase.

    Attributes:
      encoder: the sentence encoder, with an absolute path.
      reads: the student's input.
      output: directory of the files.
      share: of the rows, in (0, 1], that are drawn.
      seed: the run's seed, which they are drawn with.
      batch_rows: most rows that are read at a time.
    """

    encoder: EncoderConfig
    reads: InputConfig
    output: str
    share: float
    seed: int
    batch_rows: int

    def __call__(self, unit: Unit) -> Iterator[tuple[Path, Path]]:
        """Encode the drawn rows of a unit, when iterated."""
        rows = np.arange(unit.rows)
        if self.share < 1:
            rng: np.random.Generator = shard_rng(self.seed, 0, f"encoder {unit.uid}")
            rows = rows[rng.random(unit.rows) < self.share]
        columns = dict.fromkeys([*self.reads.columns, *([self.encoder.column] if self.encoder.column else [])])
        reader = RowReader(tuple(columns), self.batch_rows)
        encoded = (self._encoded(without_dictionaries(batch)) for batch, _ in reader.read(unit, rows))
        tables = [table for table in encoded if table.num_rows]
        count("rows_scored", len(rows))
        file = self._file(unit)
        temporary = temporary_name(file)
        with timed("write"):
            pq.write_table(pa.concat_tables(tables) if tables else pa.table({}), temporary)
        yield temporary, file

    def _encoded(self, batch: pa.RecordBatch) -> pa.Table:
        found = find_usable(_input(self.reads), batch)
        usable = batch.take(pa.array(found.rows))
        with timed("score"):
            vectors = self._vectors(usable)
        finite = np.isfinite(vectors).all(axis=1)
        inputs = np.empty((0, 1), np.int64) if found.inputs is None else found.inputs
        bags = bags_of(self.reads, inputs[finite])
        starts = pa.array(bags.indptr.astype(np.int32))
        vectors = vectors[finite]
        width = max(vectors.shape[1], 1)
        return pa.table(
            {
                "places": pa.ListArray.from_arrays(starts, pa.array(bags.indices.astype(np.int32))),
                "weights": pa.ListArray.from_arrays(starts, pa.array(bags.data.astype(np.float32))),
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).reshape(-1)), width),
            }
        )

    def _vectors(self, batch: pa.RecordBatch) -> npt.NDArray[np.float32]:
        if self.encoder.column is not None:
            return _of_column(batch, self.encoder.column)
        assert self.encoder.folder is not None
        encoder = _encoder(self.encoder.folder, self.encoder.max_length)
        texts = [t.decode() if isinstance(t, bytes) else str(t) for t in batch[self.reads.columns[0]].to_pylist()]
        parts = [encoder(texts[i : i + ENCODED_AT_ONCE]) for i in range(0, len(texts), ENCODED_AT_ONCE)]
        return np.concatenate(parts) if parts else np.empty((0, 1), np.float32)

    def _file(self, unit: Unit) -> Path:
        return Path(self.output) / f"{unit.uid}.parquet"


def bags_of(reads: InputConfig, inputs: npt.NDArray[np.generic]) -> sparse.csr_matrix:
    """Give the bags that a text network sums, of inputs as `make_input` makes them."""
    if reads.gives_ids:
        return id_bags(np.asarray(inputs, np.int64), padding_id(reads), vocabulary_size(reads))
    return vector_bags(np.asarray(inputs, np.float64))


def read_bags(
    directory: str | Path, units: tuple[Unit, ...], vocabulary: int, vectors: bool
) -> Iterator[tuple[sparse.csr_matrix, npt.NDArray[np.float32]]]:
    """Read the units' files one by one: bags [rows, V], and the vectors [rows, m] where they are asked for."""
    for unit in units:
        path = Path(directory) / f"{unit.uid}.parquet"
        table = pq.read_table(path, columns=[*_BAG, *(["vector"] if vectors else [])])
        if not table.num_rows:
            continue
        places, weights = (table[name].combine_chunks() for name in _BAG)
        starts = places.offsets.to_numpy()
        bags = sparse.csr_matrix(
            (weights.flatten().to_numpy().astype(np.float64), places.flatten().to_numpy(), starts - starts[0]),
            shape=(table.num_rows, vocabulary),
        )
        said = np.empty((table.num_rows, 0), np.float32)
        if vectors:
            column = table["vector"].combine_chunks()
            said = column.flatten().to_numpy().reshape(table.num_rows, column.type.list_size)
        yield bags, said


def _of_column(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.float32]:
    column = batch[name]
    rows = [None if row is None else np.asarray(row, np.float32) for row in column.to_numpy(zero_copy_only=False)]
    widths = {len(row) for row in rows if row is not None}
    if len(widths) > 1:
        raise InputError(
            f"student.encoder.column: vectors of {name} must have as many numbers in every row, got {min(widths)} and {max(widths)}"
        )
    missing = np.full(max(widths, default=1), np.nan, np.float32)
    return np.stack([missing if row is None else row for row in rows]) if rows else np.empty((0, 1), np.float32)


@lru_cache(maxsize=1)
def _encoder(folder: str, max_length: int) -> SentenceEncoder:
    return SentenceEncoder(folder, max_length)


@lru_cache(maxsize=1)
def _input(reads: InputConfig) -> MakeInput:
    return make_input(reads)
