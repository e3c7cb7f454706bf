"""The columns of a pool: their types, what its vectors are made of, and which is the id."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from distilbeam.pipelines.ingest.columns import ColumnType, arrow_field
from distilbeam.pipelines.ingest.settings import IngestOptions


@dataclass(frozen=True)
class PoolColumns:
    """The columns of a pool.

    Attributes:
      columns: their types, in their order.
      members: vector column -> the columns of the sources that it is made of.
      id_column: the user's id, or None where a column `id` is added.
    """

    columns: Mapping[str, ColumnType]
    members: Mapping[str, tuple[str, ...]]
    id_column: str | None

    @property
    def schema(self) -> pa.Schema:
        """Schema of the pool; the id comes first."""
        fields = [arrow_field(name, type_) for name, type_ in self.columns.items()]
        return pa.schema(fields if self.id_column else [pa.field("id", pa.string()), *fields])

    def describe(self) -> dict[str, str]:
        """Name the type of each column of the schema for a reader."""
        return {name: self.columns[name].describe() if name in self.columns else "string" for name in self.schema.names}


def pool_columns(found: Mapping[str, ColumnType], options: IngestOptions) -> PoolColumns:
    """Decide a pool's columns.

    Args:
      found: the sources' columns with the types that were found, in their order.
      options: vectors, types and id of the user.

    Raises:
      ValueError: options that name columns which are not there, or do not fit them.
    """
    columns: dict[str, ColumnType] = {}
    members: dict[str, list[str]] = {name: [] for name in options.vectors}
    for name, type_ in found.items():
        vector = options.vector_of(name)
        if vector is None:
            columns[name] = ColumnType(options.types[name]) if name in options.types else type_
        else:
            members[vector].append(name)
            columns.setdefault(vector, type_)
    for name, vector_option in options.vectors.items():
        width = len(members[name])
        if not width:
            raise ValueError(
                f"--vector {name} must name columns of the sources, got {', '.join(vector_option.columns)}; the columns are {', '.join(found)}"
            )
        shape = vector_option.shape or (width,)
        if math.prod(shape) != width:
            raise ValueError(f"--shape {name} must have as many elements as its {width:,} columns, got {list(shape)}")
        if name in found and name not in members[name]:
            raise ValueError(
                f"--vector {name} must not have the name of a column that is not in it; choose another name"
            )
        columns[name] = ColumnType("vector", vector_option.dtype, shape)
    _check_names(columns, options)
    if options.id_column is not None:
        columns = {options.id_column: columns[options.id_column], **columns}
    return PoolColumns(columns, {name: tuple(names) for name, names in members.items()}, options.id_column)


def _check_names(columns: Mapping[str, ColumnType], options: IngestOptions) -> None:
    listed = ", ".join(columns)
    if options.id_column is not None and options.id_column not in columns:
        raise ValueError(f"--id must name a column of the sources, got {options.id_column}; the columns are {listed}")
    if options.id_column is None and "id" in columns:
        raise ValueError("the sources have a column id of their own; give --id id to take it for the examples' ids")
    unknown = [name for name in options.types if name not in columns]
    if unknown:
        raise ValueError(f"--type must name a column of the sources, got {unknown[0]}; the columns are {listed}")
