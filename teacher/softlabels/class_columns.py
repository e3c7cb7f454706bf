"""Soft labels as a table of classes, for tools that know no soft labels: `label`, `label_name` and `confidence` in front.

    label       int64, the most probable class; of equally probable ones the first that is stored
    label_name  string, its name (its number where the classes have none)
    confidence  float32, its probability, at the temperature of the labels

The user's id is under its own name, everything else is as it is stored. Rows without an id, whose content is their id, have it in
hexadecimal digits: an id is a text in every split, for a set of data has one type of a column. The schema's metadata hold the names
of the classes under `huggingface`, so that `datasets.load_dataset` makes a `ClassLabel` of `label`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distilbeam.extras import Need, require_extras
from distilbeam.storage.atomic import committed_directory
from distilbeam.storage.stores import store_of
from distilbeam.teacher.softlabels.codec import decode
from distilbeam.teacher.softlabels.columns import parquet_options
from distilbeam.teacher.softlabels.manifest import Manifest, read_manifest
from distilbeam.teacher.softlabels.spec import SoftLabelSpec, require_unit

if TYPE_CHECKING:
    from datasets import DatasetDict

ID, ROW = "example_id", "pool_row"
_ADDED = ("label", "label_name", "confidence")
_BATCH_ROWS = 16_384
Splits = Mapping[str, Sequence[str | Path]]


def with_classes(rows: pa.Table, spec: SoftLabelSpec, id_column: str = ID, prefix: str = "") -> pa.Table:
    """Put the most probable class, its name and its probability in front of soft labels.

    Args:
      rows: rows of a shard [n], with its label columns.
      spec: the specification of the labels.
      id_column: name that the column `example_id` gets.
      prefix: what the three new columns' names begin with.

    Returns:
      A table of n rows: the id, the three columns, the rest as it is; class names in its metadata.

    Raises:
      ValueError: two columns would have one name, or the labels are of tokens.
    """
    require_unit(spec, "example", "the dataset")
    found = decode(rows, spec)
    best = found.logprobs.argmax(axis=1)
    each = np.arange(len(best))
    label = best if found.classes is None else found.classes[each, best]
    names = pa.array([spec.class_name(i) for i in range(spec.num_classes)] if spec.classes is None else spec.classes)
    added = {
        "label": pa.array(label.astype(np.int64)),
        "label_name": names.take(pa.array(label)),
        "confidence": pa.array(np.exp(found.logprobs[each, best])),
    }
    rest = [name for name in rows.column_names if name != ID]
    columns = {id_column: _as_text(rows[ID]), **{f"{prefix}{name}": values for name, values in added.items()}}
    both = [name for name in rest if name in columns]
    if both:
        raise ValueError(
            f"the labels carry a column {both[0]} themselves; let the added columns begin with something, such as the prefix "
            "'teacher_', and leave the id its name example_id where it is the id's"
        )
    table = pa.table({**columns, **{name: rows[name] for name in rest}})
    features = {f"{prefix}label": {"names": names.to_pylist(), "_type": "ClassLabel"}}
    metadata = {**(rows.schema.metadata or {}), b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return table.replace_schema_metadata(metadata)


def _as_text(ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Write the hashes of rows without an id in hexadecimal digits; other ids are as they are."""
    if not pa.types.is_fixed_size_binary(ids.type):
        return ids
    return pa.chunked_array([pa.array([None if one is None else one.hex() for one in ids.to_pylist()], pa.string())])


def write_dataset(
    splits: Splits, directory: Path, id_column: str = ID, prefix: str = "", ids: Mapping[str, pa.Array] | None = None
) -> dict[str, int]:
    """Write soft labels as a folder of Parquet files that `datasets.load_dataset` reads with the names of the classes.

    Args:
      splits: names of splits, and the soft-label datasets of each.
      directory: where to write, whole or not at all; must not be there yet.
      id_column: see `with_classes`.
      prefix: see `with_classes`.
      ids: by split, the user's ids of all rows of its set, where the labels have the hashes of the rows' content instead.

    Returns:
      The rows of each split. A file holds the rows of a shard; its name says its split: `train-00000-of-00002.parquet`.

    Raises:
      ValueError: something is at `directory`, a dataset has no manifest, or two columns would have one name.
    """
    if directory.exists():
        raise ValueError(f"{directory} is there already; name another folder or remove it")
    read = {split: [read_manifest(path) for path in paths] for split, paths in splits.items()}
    with committed_directory(directory) as folder:
        for split, manifests in read.items():
            shards = [(path, manifest.spec) for manifest in manifests for path in manifest.paths()]
            for number, (path, spec) in enumerate(shards):
                target = folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet"
                tables = _tables(path, spec, id_column, prefix, (ids or {}).get(split))
                _write(target, tables)
    return {split: sum(manifest.rows for manifest in manifests) for split, manifests in read.items()}


def to_dataset(labels: str | Path | Splits, id_column: str = ID, prefix: str = "") -> DatasetDict:
    """Read soft labels as a Hugging Face `DatasetDict`, in memory, with a `ClassLabel` and the log-probabilities beside it.

    Args:
      labels: a soft-label dataset, which becomes the split `train`; or names of splits, and the datasets of each.
      id_column: see `with_classes`.
      prefix: see `with_classes`.

    Returns:
      The splits. `distilbeam to-dataset` writes the same as files, for labels that do not fit into memory.

    Raises:
      ValueError: the package `datasets` is not installed, a dataset has no manifest, or two columns would have one name.
    """
    require_extras([Need("to_dataset", "hf", ("datasets",))])
    from datasets import Dataset, DatasetDict

    splits = labels if isinstance(labels, Mapping) else {"train": [labels]}
    return DatasetDict(
        {
            split: Dataset(pa.concat_tables(_read(map(read_manifest, paths), id_column, prefix)))
            for split, paths in splits.items()
        }
    )


def _read(manifests: Iterator[Manifest], id_column: str, prefix: str) -> Iterator[pa.Table]:
    for manifest in manifests:
        for path in manifest.paths():
            yield from _tables(path, manifest.spec, id_column, prefix)


def _tables(
    path: Path, spec: SoftLabelSpec, id_column: str, prefix: str, ids: pa.Array | None = None
) -> Iterator[pa.Table]:
    with store_of(path).open_parquet(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS):
            rows = pa.Table.from_batches([batch])
            if ids is not None:
                rows = rows.set_column(rows.column_names.index(ID), ID, pa.chunked_array([ids]).take(rows[ROW]))
            yield with_classes(rows, spec, id_column, prefix)


def _write(path: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)  # no shard is empty
    with pq.ParquetWriter(path, first.schema, **parquet_options(first.schema)) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
