"""Load soft labels: from the manifest of a dataset to batches of tensors, shuffled, resumable at any world size."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from distilbeam.kernels.labels import DenseLabels, Labels, SampledLabels, TopKLabels
from distilbeam.student.order import EpochOrder, share
from distilbeam.teacher.preprocess import InputConfig, make_input
from distilbeam.teacher.softlabels import SoftLabelSpec, decode, read_manifest

Batch = dict[str, Tensor]
STATE_VERSION = 1


class SoftLabelDataset:
    """Batches of a soft-label dataset, as an iterable whose whole state is an epoch and a position.

    Iterating goes on from the position reached to the end of the epoch, so that iterating again is the next epoch. A
    batch maps names to tensors: `teacher_logprobs` float32 [b, C or k], for sparse labels `teacher_classes` int64 [b,
    k] and for top-k labels `teacher_tail_logmass` float32 [b]; every scalar column of numbers [b]; `row` int64 [b], the
    row's number in the dataset; and `inputs` float32 [b, ...] when `input` is given, else every carried column that is
    a tensor.

    Args:
      path: directory of a dataset, or several of them with the same specification.
      batch_size: rows per rank and step; only the last step of an epoch has fewer.
      seed: of the order, which does not depend on the ranks.
      rank: this process's number.
      world_size: number of processes that share the dataset.
      input: how columns become the student's input.
      buffer_rows: rows that are held and shuffled together; at most two such windows are in memory.
      columns: scalar columns to read; None for all.

    Raises:
      ValueError: an argument is out of range, a dataset has no manifest, or the datasets' specifications differ.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        input: InputConfig | None = None,  # noqa: A002 - the name of the configuration section
        buffer_rows: int = 65_536,
        columns: Sequence[str] | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("world_size", world_size), ("buffer_rows", buffer_rows)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be between 0 and {world_size - 1}, got {rank}")
        paths = [path] if isinstance(path, str | Path) else list(path)
        self.spec, self._groups, keys = _open(paths)
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, seed, rank, world_size
        self.rows = sum(group.rows for group in self._groups)
        self._input = None if input is None else (input, make_input(input))
        self._columns, self._buffer_rows = columns, buffer_rows
        self._digest = hashlib.blake2b(json.dumps([keys, buffer_rows]).encode(), digest_size=8).hexdigest()
        self._epoch, self._position = 0, 0
        self._windows: dict[tuple[int, ...], Batch] = {}

    def __len__(self) -> int:
        """Return the number of steps of a whole epoch."""
        return math.ceil(self.rows / (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        """Give the rank's batches from the position reached to the end of the epoch."""
        if self._position >= self.rows:
            self._epoch, self._position = self._epoch + 1, 0
        order = EpochOrder([g.rows for g in self._groups], self._buffer_rows, self.seed, self._epoch)
        with ThreadPoolExecutor(1) as background:
            reader = _Reader(self, order, background)
            while self._position < self.rows:
                start, stop, self._position = share(
                    self._position, self.rows, self.batch_size, self.rank, self.world_size
                )
                yield reader.read(start, stop)

    @property
    def scalar_columns(self) -> set[str]:
        """Names of the columns of numbers that every shard has."""
        schemas = [group.file.schema_arrow for group in self._groups]
        names = [{field.name for field in schema if _is_number(field.type)} for schema in schemas]
        return set.intersection(*names) if names else set()

    def mean(self, column: str) -> float:
        """Average a scalar column over all rows."""
        groups = [group.file.read_row_group(group.number, columns=[column]) for group in self._groups]
        return float(pc.mean(pa.concat_tables(groups)[column]).as_py())

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
                    "resume with the same files, seed and buffer_rows"
                )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])

    def window(self, groups: Sequence[int]) -> Batch:
        """Read row groups into tensors; the last two reads, and a dataset of one window, are kept."""
        key = tuple(sorted(groups))
        if key not in self._windows:
            parts = [self._read(group) for group in key]
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            self._windows = dict([*self._windows.items(), (key, tensors)][-2:])
        return self._windows[key]

    def _read(self, number: int) -> Batch:
        group = self._groups[number]
        table = group.file.read_row_group(group.number, columns=self._wanted(group.file.schema_arrow))
        batch = table.combine_chunks().to_batches()[0]
        tensors = _tensors(batch, self._input is None)
        labels = decode(batch, self.spec)
        tensors["teacher_logprobs"] = torch.tensor(labels.logprobs)
        if labels.classes is not None:
            tensors["teacher_classes"] = torch.tensor(labels.classes).long()
        if labels.tail_logmass is not None:
            tensors["teacher_tail_logmass"] = torch.tensor(labels.tail_logmass)
        if self._input is not None:
            tensors["inputs"] = torch.tensor(self._input[1](batch))
        tensors["row"] = torch.arange(group.first_row, group.first_row + group.rows)
        return tensors

    def _wanted(self, schema: pa.Schema) -> list[str]:
        """Choose the columns to read: the labels', the input's, and the scalars that were asked for."""
        inputs = set() if self._input is None else set(self._input[0].columns)
        return [
            field.name
            for field in schema
            if field.name.startswith("teacher_")
            or field.name in inputs
            or (self._input is None and _is_tensor(field.type))
            or (_is_number(field.type) and (self._columns is None or field.name in self._columns))
        ]


def teacher_labels(batch: Mapping[str, Tensor], spec: SoftLabelSpec) -> Labels:
    """Make the labels of a batch into what the losses take.

    Args:
      batch: from a SoftLabelDataset.
      spec: of the dataset.

    Returns:
      DenseLabels, TopKLabels or SampledLabels.
    """
    if spec.kind == "dense":
        return DenseLabels(batch["teacher_logprobs"])
    if spec.kind == "top_k":
        return TopKLabels(batch["teacher_logprobs"], batch["teacher_classes"], batch["teacher_tail_logmass"])
    return SampledLabels(batch["teacher_logprobs"], batch["teacher_classes"])


class _Group:
    """A row group: the file it is in, its number there, and the first of its rows in the dataset."""

    def __init__(self, file: pq.ParquetFile, number: int, rows: int, first_row: int) -> None:
        self.file, self.number, self.rows, self.first_row = file, number, rows, first_row


class _Reader:
    """Reads positions of an epoch's order, the next window while the present one is being used."""

    def __init__(self, dataset: SoftLabelDataset, order: EpochOrder, background: ThreadPoolExecutor) -> None:
        self.dataset, self.order, self.background = dataset, order, background
        self.current: tuple[int, Batch, Tensor] | None = None
        self.next: tuple[int, Future[Batch]] | None = None

    def read(self, start: int, stop: int) -> Batch:
        pieces = [self._piece(*piece) for piece in self.order.pieces(start, stop)]
        if len(pieces) == 1:
            return pieces[0]
        if not pieces:  # a rank without a share of the last step
            return {name: value[:0] for name, value in self._window(len(self.order.windows) - 1)[0].items()}
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _piece(self, window: int, start: int, stop: int) -> Batch:
        tensors, permutation = self._window(window)
        rows = permutation[start:stop]
        return {name: value[rows] for name, value in tensors.items()}

    def _window(self, number: int) -> tuple[Batch, Tensor]:
        if self.current is None or self.current[0] != number:
            ahead = self.next[1] if self.next is not None and self.next[0] == number else None
            tensors = self.dataset.window(self.order.windows[number]) if ahead is None else ahead.result()
            self.current = number, tensors, torch.from_numpy(self.order.permutation(number))
            if number + 1 < len(self.order.windows):
                groups = self.order.windows[number + 1]
                self.next = number + 1, self.background.submit(self.dataset.window, groups)
        return self.current[1:]


def _open(paths: Sequence[str | Path]) -> tuple[SoftLabelSpec, list[_Group], list[Any]]:
    """Read the manifests: the common specification, all row groups, and the keys that identify them."""
    if not paths:
        raise ValueError("path must name at least one soft-label dataset, got none")
    manifests = [read_manifest(path) for path in paths]
    spec: SoftLabelSpec = manifests[0].spec
    for path, manifest in zip(paths, manifests, strict=True):
        if differences := spec.differences(manifest.spec):
            raise ValueError(
                f"soft labels that are read together must mean the same, {paths[0]} and {path} differ in "
                f"{' and '.join(differences)}"
            )
    groups: list[_Group] = []
    rows = 0
    for file in [pq.ParquetFile(p) for manifest in manifests for p in manifest.paths()]:
        for number in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(number).num_rows
            if size:
                groups.append(_Group(file, number, size, rows))
            rows += size
    return spec, groups, [[entry.key, entry.rows] for manifest in manifests for entry in manifest.entries]


def _tensors(batch: pa.RecordBatch, with_lists: bool) -> Batch:
    """Make tensors of the columns that hold numbers, leaving the labels to the codec."""
    tensors = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if _is_number(field.type):
            tensors[field.name] = torch.tensor(column.to_numpy(zero_copy_only=False))
        elif with_lists and _is_tensor(field.type) and not field.name.startswith("teacher_"):
            values = column.flatten().to_numpy(zero_copy_only=False)
            tensors[field.name] = torch.tensor(values.reshape(len(column), field.type.list_size))
    return tensors


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_tensor(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) and _is_number(kind.value_type))
