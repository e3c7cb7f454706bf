"""The loader of soft labels: from the manifests of datasets to batches of tensors, shuffled, resumable at any world size.

Threads read windows of row groups ahead, others take batches out of them, make the student's input and apply the
transform; the training's thread only receives. A batch is a function of the dataset, the seed, the epoch and its
position, whatever the number of threads.

Every rank reads every window, of which it needs rows at random places, but decodes images, tokenises text and copies
numbers of its own rows alone: an order that does not depend on the ranks spreads each rank's rows over all row groups.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from distilbeam.inputs.config import InputConfig, InputError
from distilbeam.kernels.labels import DenseLabels, SampledLabels, TopKLabels
from distilbeam.student.data.bad_rows import BadRowError, first_without_input, place_of, require_finite, require_values
from distilbeam.student.data.batch_rng import Place as Place
from distilbeam.student.data.column_types import common_fields, is_carried_tensor, is_number
from distilbeam.student.data.columns import INPUTS, ColumnReader
from distilbeam.student.data.columns import Batch as Batch
from distilbeam.student.data.input_maker import InputMaker
from distilbeam.student.data.prefetch import Work, in_background
from distilbeam.student.data.row_groups import RowGroup, open_datasets
from distilbeam.student.data.sampler import EpochOrder, Shares, mixed_visits
from distilbeam.student.data.shuffle import GroupColumns, Memory, ShuffledColumns, UnitRows, shuffle
from distilbeam.teacher.softlabels import SoftLabelSpec
from distilbeam.teacher.softlabels.spec import Unit, require_unit

STATE_VERSION = 3
Transform = Callable[[Batch, Place], Batch]
PIECE_BYTES = 2**22  # of rows taken at once: large enough to cost no Python, small enough to stay in the cache


class SoftLabelDataset:
    """Batches of soft-label datasets, as an iterable whose whole state is an epoch and a position.

    Iterating goes on from the position reached to the end of the epoch, so that iterating again is the next epoch. A
    batch maps names to tensors: `teacher_logprobs` float32 [b, C or k], for sparse labels `teacher_classes` int64 [b,
    k] and for top-k labels `teacher_tail_logmass` float32 [b]; every scalar column of numbers that all shards have [b];
    `row` int64 [b], the row's number in the datasets; and `inputs` [b, ...] when `input` is given, else every carried
    column that is a tensor.

    Args:
      path: directory of a dataset, or several of them with the same specification.
      batch_size: rows per rank and step, or what gives them for the datasets' number of rows; only the last two steps of an
        epoch have fewer, which share what is left evenly.
      seed: decides the order of the rows, which does not depend on the ranks.
      rank: this process's number.
      world_size: number of processes that share the datasets.
      input: how columns become the student's input.
      pseudo: datasets that are read with them, whose labels are students' own, at a temperature of their own.
      buffer_rows: rows that are held and shuffled together; at most four such windows are in memory, two more than workers
        where those are more than two.
      columns: scalar columns to read; None for all.
      mixing_weights: share of each dataset in an epoch, up to a common factor; None for their numbers of rows. An epoch
        has as many rows as there are; each row of a dataset is visited equally often, give or take one visit.
      transform: changes a batch in the background; what it draws must come from the place it is given.
      workers: threads that make batches, and as many, two at least, that read; they change nothing but the time.
      cache_bytes: when all rows as tensors take no more memory than this, they are read once and kept.
      pin_memory: make tensors in page-locked memory, from which a GPU copies while the processor goes on.
      unit: what has a label; labels of the other unit are refused. `TokenLabelDataset` reads those of tokens.

    Raises:
      ValueError: an argument is out of range, a dataset has no manifest, its labels are of another unit, or the datasets'
        specifications differ.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        batch_size: int | Callable[[int], int],
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        input: InputConfig | None = None,  # noqa: A002 - the name of the configuration section
        buffer_rows: int = 65_536,
        pseudo: Sequence[str | Path] = (),
        columns: Sequence[str] | None = None,
        mixing_weights: Sequence[float] | None = None,
        transform: Transform | None = None,
        workers: int = 1,
        cache_bytes: int = 2**30,
        pin_memory: bool = False,
        unit: Unit = "example",
    ) -> None:
        for name, value, least in (
            ("batch_size", 1 if callable(batch_size) else batch_size, 1),
            ("seed", seed, 0),
            ("world_size", world_size, 1),
            ("buffer_rows", buffer_rows, 1),
            ("workers", workers, 1),
            ("cache_bytes", cache_bytes, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and {world_size - 1}, got {rank}")
        paths = list(path) if isinstance(path, Sequence) and not isinstance(path, str) else [path]
        opened = open_datasets(paths, pseudo)
        self.spec = opened.spec
        require_unit(self.spec, unit, paths[0])
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.transform, self.workers = transform, workers
        self._groups: list[RowGroup] = [group for groups in opened.groups for group in groups]
        self.rows = sum(group.rows for group in self._groups)
        self.batch_size = batch_size(self.rows) if callable(batch_size) else batch_size
        self._buffer_rows = buffer_rows
        self._visits = None if mixing_weights is None else _visits(opened.groups, mixing_weights)
        identity = [opened.keys, buffer_rows] + ([] if self._visits is None else [self._visits])
        self._digest = hashlib.blake2b(json.dumps(identity).encode(), digest_size=8).hexdigest()
        self._fields = common_fields(list({id(g.file): g.file.schema for g in self._groups}.values()))
        maker = None if input is None else InputMaker.of(input, self._groups[0])
        self._memory, self._pinned = Memory(pin_memory), pin_memory
        self._reader = ColumnReader(self.spec, self._wanted(maker, columns), maker, self._memory)
        self._first = self._reader.first(self._groups[0])
        self._cache_bytes = cache_bytes
        self._cache: dict[int, GroupColumns] = {}
        self._checked: set[int] = set()  # row groups whose inputs are known to be finite
        self._epoch, self._position = 0, 0

    def __len__(self) -> int:
        """Return the number of steps of a whole epoch."""
        return math.ceil(self.rows / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        """Give the rank's batches from the position reached to the end of the epoch."""
        if self._position >= self.rows:
            self._epoch, self._position = self._epoch + 1, 0
        order = EpochOrder([g.rows for g in self._groups], self._buffer_rows, self.seed, self._epoch, self._visits)
        shares = Shares.of(self._position, self.rows, self.batch_size, self.rank, self.world_size)
        batches_per_piece = max(1, PIECE_BYTES // (self._row_bytes * self.batch_size))
        work = Work(order, shares, self._read, self._shuffle, self._make)
        for batch, end in in_background(work, batches_per_piece, self.workers):
            self._position = end
            yield batch

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one row's input.

        Raises:
          ValueError: the dataset was not given an `input`.
        """
        if INPUTS not in self._first:
            raise ValueError("input must be given to the dataset, which otherwise makes no inputs that have a shape")
        return tuple(self._first[INPUTS].shape[1:])

    @property
    def scalar_columns(self) -> set[str]:
        """Names of the columns of numbers that every shard has."""
        return {field.name for field in self._fields if is_number(field.type)}

    def mean(self, column: str) -> float:
        """Average a scalar column over the rows of an epoch, each as often as it is visited.

        Raises:
          ValueError: a row group has no value in it.
        """
        visits = self._visits or [group.rows for group in self._groups]
        found = [pc.mean(group.read([column])[column]).as_py() for group in self._groups]
        if None in found:
            raise ValueError(f"{place_of(self._groups[found.index(None)], 0)} and those after it have no {column}")
        means = [float(mean) for mean in found]
        return sum(mean * count for mean, count in zip(means, visits, strict=True)) / self.rows

    def require_values(self, column: str, least: float, greatest: float) -> None:
        """Check that every row has a value in a range in a scalar column.

        Args:
          column: its name.
          least: smallest value allowed.
          greatest: largest; with infinity every finite one.

        Raises:
          ValueError: a row has not; the message has file and row.
        """
        require_values(self._groups, column, least, greatest)

    def place_of(self, row: int) -> str:
        """Say where a row is, by its number in the datasets: its file, its number there and its id."""
        group = next(group for group in self._groups if group.first_row <= row < group.first_row + group.rows)
        return place_of(group, row - group.first_row)

    def state_dict(self) -> dict[str, Any]:
        """Return where the iteration stands after the last batch that was given out, as plain data."""
        return {
            "version": STATE_VERSION,
            "dataset": self._digest,
            "seed": self.seed,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, at any batch size and world size.

        Args:
          state: from `state_dict` of a dataset over the same files with the same seed.

        Raises:
          ValueError: the state belongs to another dataset, seed or version.
        """
        mine = self.state_dict()
        for name in ("version", "dataset", "seed"):
            if state.get(name) != mine[name]:
                raise ValueError(
                    f"the state's {name} must be that of this dataset, {mine[name]!r}, got {state.get(name)!r}; "
                    "resume with the same files, seed, buffer_rows and mixing_weights"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    @property
    def _row_bytes(self) -> int:
        return sum(value.nbytes for value in self._first.values())

    def _wanted(self, maker: InputMaker | None, scalars: Sequence[str] | None) -> pa.Schema:
        """Choose the columns to read: the labels', the input's, and the scalars that were asked for."""
        inputs = set() if maker is None else set(maker.config.columns)
        return pa.schema(
            field
            for field in self._fields
            if field.name.startswith("teacher_")
            or field.name in inputs
            or (maker is None and is_carried_tensor(field))
            or (is_number(field.type) and (scalars is None or field.name in scalars))
        )

    @property
    def _is_cached(self) -> bool:
        return self.rows * self._row_bytes <= self._cache_bytes

    def _read(self, number: int) -> pa.Table | GroupColumns:
        """Read a row group, or find it in the cache."""
        return self._cache.get(number) or self._reader.scan(self._groups[number])

    def _shuffle(
        self, order: EpochOrder, window: int, read: dict[int, pa.Table | GroupColumns], shares: Shares
    ) -> ShuffledColumns:
        """Put the rank's rows of a window in the order of their visit."""
        columns = {number: self._columns(number, found) for number, found in read.items()}
        units = [UnitRows(columns[order.units[unit][0]], order.drawn(unit)) for unit in order.windows[window]]
        return shuffle(units, *shares.places(order, window), self._memory)

    def _columns(self, number: int, found: pa.Table | GroupColumns) -> GroupColumns:
        if isinstance(found, GroupColumns):
            return found
        columns = self._usable(number, found)
        if self._is_cached:
            self._cache[number] = columns
        return columns

    def _usable(self, number: int, table: pa.Table) -> GroupColumns:
        """Make a row group's table into arrays; their inputs are checked when they are first read."""
        group, make = self._groups[number], self._reader.whole if self._is_cached else self._reader.columns
        try:
            columns = make(group, table)
            if number not in self._checked and INPUTS in columns.arrays:
                require_finite(columns.arrays[INPUTS])
                self._checked.add(number)
        except InputError as e:
            assert self._reader.maker is not None
            bad = first_without_input(self._reader.maker.made, table)
            place = f"{group.file.path}:" if bad is None else place_of(group, bad.row)
            raise InputError(self._unusable(place, bad or e)) from e
        except BadRowError as e:
            raise InputError(self._unusable(place_of(group, e.row), e)) from None
        return columns

    def _unusable(self, place: str, error: Exception) -> str:
        return (
            f"{place} {error}; correct the example in the pool and label it again, or leave the column out of the student's "
            "input"
        )

    def _make(
        self, parts: Sequence[tuple[ShuffledColumns, slice]], sizes: Sequence[int], starts: Sequence[int]
    ) -> list[Batch]:
        """Take the rows of some batches and cut them into these batches."""
        try:
            taken = [self._reader.take(columns, rows) for columns, rows in parts]
        except BadRowError as e:
            raise InputError(self._unusable(self.place_of(e.row), e)) from e
        taken = taken or [{n: v[:0] for n, v in self._first.items()}]
        whole = taken[0] if len(taken) == 1 else {name: torch.cat([part[name] for part in taken]) for name in taken[0]}
        cut = zip(*(value.split(list(sizes)) for value in whole.values()), strict=True)
        batches = [dict(zip(whole, values, strict=True)) for values in cut]
        if self.transform is not None:
            places = [Place(self.seed, self._epoch, start) for start in starts]
            batches = [self.transform(batch, place) for batch, place in zip(batches, places, strict=True)]
        if self._pinned:  # what was joined or changed is not
            batches = [{name: value.pin_memory() for name, value in batch.items()} for batch in batches]
        return batches


def teacher_labels(batch: Mapping[str, Tensor], spec: SoftLabelSpec) -> DenseLabels | TopKLabels | SampledLabels:
    """Make the labels of a batch into what the losses take.

    Args:
      batch: from a SoftLabelDataset.
      spec: how the dataset's labels are stored.

    Returns:
      DenseLabels, TopKLabels or SampledLabels.
    """
    if spec.kind == "dense":
        return DenseLabels(batch["teacher_logprobs"])
    if spec.kind == "top_k":
        return TopKLabels(batch["teacher_logprobs"], batch["teacher_classes"], batch["teacher_tail_logmass"])
    return SampledLabels(batch["teacher_logprobs"], batch["teacher_classes"])


def _visits(datasets: Sequence[Sequence[RowGroup]], weights: Sequence[float]) -> list[int]:
    if len(weights) != len(datasets):
        raise ValueError(f"mixing_weights must be one for each of the {len(datasets)} datasets, got {len(weights)}")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"mixing_weights must be finite, at least 0 and not all 0, got {list(weights)}")
    return mixed_visits([[group.rows for group in groups] for groups in datasets], weights)
