"""The embeddings that text students of a run start from, regressed on a sentence encoder once; no call of the teacher.

    run/encoder/DIGEST/        what the encoder says of rows of the pool, a file for each unit; see `acquisition/encode_texts.py`
    run/encoder/DIGEST-DIM.safetensors    the table

The digest is that of the encoder's settings and of the student's input; the pool is the run's, which stays the same. A killed
call goes on with the units that are missing; the regression reads the files once for every step of its solver, one unit at a time, so
that a pool need not fit the memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import sparse

from distilbeam.inputs.config import vocabulary_size
from distilbeam.pipelines.acquisition.encode_texts import EncodeTexts, read_bags
from distilbeam.pipelines.jobs.directory import RunDirectory
from distilbeam.pipelines.pool.datasets import Inputs
from distilbeam.student.networks.config import StudentConfig
from distilbeam.student.networks.encoder_table import regressed_table, scaled, write_table
from distilbeam.student.networks.residual import scaled as times_width


class EncoderStart:
    """What students of one configuration start from.

    Args:
      directory: of the run or of one of its variants.
      inputs: gives the run's data, which what is done already is told without.
      student: the configuration, with `init` encoder.
      seed: the run's.
      batch_rows: most rows that are read at a time.
    """

    def __init__(
        self,
        directory: RunDirectory,
        inputs: Callable[[], Inputs],
        student: StudentConfig,
        seed: int,
        batch_rows: int,
    ) -> None:
        assert student.encoder is not None
        self._inputs, self.student, self.encoder = inputs, student, student.encoder
        self._where, self._seed, self._batch_rows = directory.top / "encoder", seed, batch_rows

    @cached_property
    def inputs(self) -> Inputs:
        """The run's data."""
        return self._inputs()

    @property
    def table(self) -> Path:
        """The table's file."""
        return self._where / f"{self._digest}-{self._dim}-{self.encoder.ridge:g}.safetensors"

    @cached_property
    def work(self) -> EncodeTexts:
        """The work of the encode phase."""
        share = min(1.0, self.encoder.rows / max(self.inputs.pool.rows, 1))
        output = str(self._where / self._digest)
        return EncodeTexts(self.encoder, self.student.input, output, share, self._seed, self._batch_rows)

    def fit(self) -> Path:
        """Fit the table where there is none; units that the phase has not encoded are encoded here.

        Raises:
          ValueError: no row of the pool has both words and a vector.
        """
        if self.table.exists():
            return self.table
        units = self.inputs.pool.units
        for unit in self.work.remaining(units):
            Path(self.work.output).mkdir(parents=True, exist_ok=True)
            self.work.settle(list(self.work(unit)))
        table = regressed_table(self._bags, self._pairs, self._dim, self.encoder.ridge)
        write_table(self.table, scaled(table, self._bags))
        return self.table

    def _bags(self) -> Iterator[sparse.csr_matrix]:
        for bags, _ in read_bags(self.work.output, self.inputs.pool.units, self._vocabulary, vectors=False):
            yield bags

    def _pairs(self) -> Iterator[tuple[sparse.csr_matrix, npt.NDArray[np.float32]]]:
        return read_bags(self.work.output, self.inputs.pool.units, self._vocabulary, vectors=True)

    @property
    def _dim(self) -> int:
        return times_width(self.student.dim, self.student.width)

    @property
    def _vocabulary(self) -> int:
        reads = self.student.input
        return vocabulary_size(reads) if reads.gives_ids else reads.buckets

    @cached_property
    def _digest(self) -> str:
        about = [
            self.encoder.model_dump_json(exclude={"ridge"}),
            self.student.input.model_dump_json(),
            str(self._seed),
        ]
        return hashlib.blake2b("\n".join(about).encode(), digest_size=4).hexdigest()
