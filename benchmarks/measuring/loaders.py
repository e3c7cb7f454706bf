"""Loaders of Parquet shards, each as an iterable of the numbers of rows of its batches of torch tensors.

Every loader reads the same columns of the same files; where it can, it does so once in the order of the files, which
costs it least, and once shuffled as its documentation advises. One that is not installed raises ImportError.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import torch

from distilbeam.student.data.loader import SoftLabelDataset
from distilbeam.teacher.softlabels import read_manifest

BUFFER_ROWS = 65_536


@dataclass(frozen=True)
class Shards:
    """What is read.

    Attributes:
      path: the dataset.
      columns: to read.
      batch_size: rows of a batch.
    """

    path: Path
    columns: tuple[str, ...]
    batch_size: int

    @property
    def files(self) -> list[str]:
        """The shards."""
        return [str(path) for path in read_manifest(self.path).paths()]

    def groups(self) -> list[tuple[str, int]]:
        """File and number of every row group."""
        return [(file, group) for file in self.files for group in range(pq.read_metadata(file).num_row_groups)]


Loader = Callable[[Shards], Iterator[int]]


def scan_row_groups(shards: Shards) -> Iterator[int]:
    """Read row group by row group, and make nothing of it."""
    for file in shards.files:
        with pq.ParquetFile(file, memory_map=True) as opened:
            for group in range(opened.num_row_groups):
                yield opened.read_row_group(group, columns=list(shards.columns)).num_rows


def scan_tables(shards: Shards) -> Iterator[int]:
    """Read file by file."""
    for file in shards.files:
        yield pq.read_table(file, columns=list(shards.columns)).num_rows


def scan_dataset(shards: Shards) -> Iterator[int]:
    """Read with Arrow's scanner, which has several row groups under way."""
    for batch in pads.dataset(shards.files).scanner(columns=list(shards.columns)).to_batches():
        yield batch.num_rows


@lru_cache(maxsize=1)
def _too_large_to_keep(shards: Shards) -> SoftLabelDataset:
    return SoftLabelDataset(shards.path, shards.batch_size, 0, columns=shards.columns, cache_bytes=0)


def distilbeam(shards: Shards) -> Iterator[int]:
    """Read with ours, shuffled, a dataset that no memory is to hold: another epoch of the same one in every call."""
    dataset = _too_large_to_keep(shards)
    dataset.load_state_dict({**dataset.state_dict(), "position": dataset.rows})  # of an epoch that was not ended, too
    return (len(batch["row"]) for batch in dataset)


def distilbeam_kept(shards: Shards) -> Iterator[int]:
    """Read a dataset that fits the cache, as from the second epoch on."""
    dataset = SoftLabelDataset(shards.path, shards.batch_size, 0, columns=shards.columns, cache_bytes=2**40)
    for _ in dataset:
        pass
    yield -1  # what came before is not measured
    for batch in dataset:
        yield len(batch["row"])


def torch_in_order(shards: Shards) -> Iterator[int]:
    """Read with a DataLoader over an iterable dataset of Arrow batches."""
    return _torch_loader(_ArrowBatches(shards))


def torch_shuffled(shards: Shards) -> Iterator[int]:
    """Read with a DataLoader over the whole table in memory, in a random order, a batch at a time."""
    table = pads.dataset(shards.files).to_table(columns=list(shards.columns)).combine_chunks()
    sampler = torch.utils.data.BatchSampler(
        torch.utils.data.RandomSampler(range(table.num_rows)), shards.batch_size, drop_last=False
    )
    loader = torch.utils.data.DataLoader(_InMemory(table), sampler=sampler, batch_size=None)
    for batch in loader:
        yield _rows(batch)


def hugging_face_streaming(shards: Shards) -> Iterator[int]:
    """Read with Hugging Face datasets from Parquet, in order."""
    return _hugging_face(shards, shuffled=False, streaming=True)


def hugging_face_streaming_shuffled(shards: Shards) -> Iterator[int]:
    """Read with Hugging Face datasets from Parquet through its shuffle buffer."""
    return _hugging_face(shards, shuffled=True, streaming=True)


def hugging_face_arrow(shards: Shards) -> Iterator[int]:
    """Read with Hugging Face datasets from the Arrow file that it makes of the Parquet files beforehand."""
    return _hugging_face(shards, shuffled=False, streaming=False)


def hugging_face_arrow_shuffled(shards: Shards) -> Iterator[int]:
    """Read with Hugging Face datasets from its Arrow file in a random order."""
    return _hugging_face(shards, shuffled=True, streaming=False)


def grain_rows(shards: Shards) -> Iterator[int]:
    """Read with Grain's Parquet dataset, which gives rows, and its batching, in order."""
    from grain.experimental import ParquetIterDataset

    rows = ParquetIterDataset(shards.files)
    wanted = rows.map(lambda row: {name: np.asarray(row[name], np.float32) for name in shards.columns})
    for batch in wanted.batch(shards.batch_size):
        yield len(torch.from_numpy(batch[shards.columns[0]]))


def grain_row_groups(shards: Shards) -> Iterator[int]:
    """Read with Grain and a source of one's own whose elements are row groups, shuffled and cut into batches."""
    import grain
    from grain.experimental import RebatchIterDataset

    groups = grain.MapDataset.source(shards.groups()).seed(0).shuffle()
    arrays = groups.random_map(lambda group, rng: _permuted(_arrays(_read(shards, *group)), rng))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=3)
    for batch in RebatchIterDataset(arrays.to_iter_dataset(options), shards.batch_size, drop_remainder=False):
        yield _rows({name: torch.from_numpy(array) for name, array in batch.items()})


def ray_in_order(shards: Shards) -> Iterator[int]:
    """Read with Ray Data, in order."""
    return _ray(shards, None)


def ray_shuffled(shards: Shards) -> Iterator[int]:
    """Read with Ray Data through its local shuffle buffer."""
    return _ray(shards, BUFFER_ROWS)


SCANS: dict[str, Loader] = {
    "pyarrow, row groups": scan_row_groups,
    "pyarrow, tables": scan_tables,
    "pyarrow, scanner": scan_dataset,
}
OURS: dict[str, Loader] = {"distilbeam, shuffled": distilbeam, "distilbeam, kept in memory, shuffled": distilbeam_kept}
PEERS: dict[str, Loader] = {
    "torch DataLoader over Arrow batches": torch_in_order,
    "torch DataLoader over a table in memory, shuffled": torch_shuffled,
    "HF datasets, streaming": hugging_face_streaming,
    "HF datasets, streaming, shuffled": hugging_face_streaming_shuffled,
    "HF datasets, Arrow file": hugging_face_arrow,
    "HF datasets, Arrow file, shuffled": hugging_face_arrow_shuffled,
    "Grain, rows": grain_rows,
    "Grain, row groups, shuffled": grain_row_groups,
    "Ray Data": ray_in_order,
    "Ray Data, shuffled": ray_shuffled,
}


class _ArrowBatches(torch.utils.data.IterableDataset[dict[str, np.ndarray]]):
    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for file in self.shards.files:
            with pq.ParquetFile(file, memory_map=True) as opened:
                for batch in opened.iter_batches(self.shards.batch_size, columns=list(self.shards.columns)):
                    yield _arrays(pa.Table.from_batches([batch]))


class _InMemory(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, table: pa.Table) -> None:
        self.arrays = {name: torch.from_numpy(array) for name, array in _arrays(table).items()}

    def __getitem__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {name: array[rows] for name, array in self.arrays.items()}


def _torch_loader(dataset: torch.utils.data.IterableDataset[dict[str, np.ndarray]]) -> Iterator[int]:
    for batch in torch.utils.data.DataLoader(dataset, batch_size=None):
        yield _rows(batch)


def _hugging_face(shards: Shards, shuffled: bool, streaming: bool) -> Iterator[int]:
    import datasets

    datasets.disable_progress_bars()
    dataset = datasets.load_dataset(
        "parquet",
        data_files=shards.files,
        split="train",
        streaming=streaming,
        columns=list(shards.columns),
        cache_dir=str(shards.path / ".hugging_face"),
    )
    if shuffled:
        dataset = dataset.shuffle(seed=0, buffer_size=BUFFER_ROWS) if streaming else dataset.shuffle(seed=0)
    yield -1  # what came before, the Arrow file above all, is not measured
    for batch in dataset.with_format("torch").iter(shards.batch_size):
        yield _rows(batch)


def _ray(shards: Shards, shuffle_rows: int | None) -> Iterator[int]:
    import ray

    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_parquet(shards.files, columns=list(shards.columns))
    batches = iter(dataset.iter_torch_batches(batch_size=shards.batch_size, local_shuffle_buffer_size=shuffle_rows))
    next(batches)
    yield -1  # its workers take seconds to start, which would be most of a short measurement
    for batch in batches:
        yield _rows(batch)


def _read(shards: Shards, file: str, group: int) -> pa.Table:
    with pq.ParquetFile(file, memory_map=True) as opened:
        return opened.read_row_group(group, columns=list(shards.columns))


def _arrays(table: pa.Table) -> dict[str, np.ndarray]:
    """Copy columns into arrays that a tensor may take over; classes as int64, as torch gathers by."""
    arrays = {}
    for name in table.column_names:
        column = table[name].combine_chunks() if table[name].num_chunks != 1 else table[name].chunk(0)
        lists = pa.types.is_fixed_size_list(column.type)
        values = column.flatten() if lists else column
        array = values.to_numpy().reshape(len(column), -1) if lists else values.to_numpy()
        arrays[name] = array.astype(np.int64 if array.dtype.kind == "i" else array.dtype)
    return arrays


def _permuted(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    order = rng.permutation(len(next(iter(arrays.values()))))
    return {name: array[order] for name, array in arrays.items()}


def _rows(batch: dict[str, torch.Tensor]) -> int:
    first = next(iter(batch.values()))
    assert isinstance(first, torch.Tensor)
    return len(first)
