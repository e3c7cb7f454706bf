"""The settings of an ingest: format, columns, types, vectors, sizes."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distilbeam.settings import Section, validated

Format = Literal["csv", "jsonl", "tfrecord", "text", "images"]
TypeName = Literal["int64", "float64", "bool", "string", "binary"]


class Vector(Section):
    """Columns of a CSV file that become one vector column."""

    columns: tuple[str, ...] = Field(
        description="names, or patterns with * and ?; in the order of the file", min_length=1
    )
    dtype: Literal["float32", "uint8", "int32", "int64"] = Field("float32", description="type of its numbers")
    shape: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="of an example; one axis without it"
    )


class IngestOptions(Section):
    """How sources are read.

    Vectors are stored as fixed-size binary with `dtype` and `shape` in the field's metadata, which readers view without
    a copy.
    """

    format: Format = Field(description="how the sources are written")
    id_column: str | None = Field(None, description="column with the user's ids; the hash of the content without one")
    class_column: str | None = Field(None, description="images: column for the name of the folder that holds the file")
    delimiter: str = Field(",", min_length=1, max_length=1, description="csv: what separates fields")
    columns: tuple[str, ...] = Field((), description="csv: names of the columns of files without a header")
    vectors: dict[str, Vector] = Field({}, description="csv: vector columns and what they are made of")
    types: dict[str, TypeName] = Field({}, description="column -> type, where the found one is not wanted")
    max_record_bytes: int = Field(
        16 * 2**20,
        ge=1,
        le=2**30,
        description="csv, jsonl, text: a longer record is a bad one, so that memory is bounded",
    )
    unit_bytes: int = Field(64 * 2**20, ge=1, description="tfrecord, images: bytes of source in a unit of work, about")
    file_rows: int = Field(1_000_000, ge=1, description="rows of a pool file, about")
    file_bytes: int = Field(256 * 2**20, ge=1, description="bytes of a pool file before compression, about")

    @model_validator(mode="after")
    def _fits_format(self) -> Self:
        for name, wanted in (("class_column", "images"), ("columns", "csv"), ("vectors", "csv")):
            if getattr(self, name) and self.format != wanted:
                raise ValueError(f"{name} must be given for {wanted} only, got format {self.format}")
        if self.format == "images" and self.id_column not in (None, "path"):
            raise ValueError(f"id_column must be path for images (the file's name), got {self.id_column}")
        if self.delimiter in '"\r\n\0':
            raise ValueError(f"delimiter must not be a quote or a line end, got {self.delimiter!r}")
        if len(set(self.columns)) < len(self.columns) or not all(self.columns):
            raise ValueError(f"columns must be names of their own, got {', '.join(self.columns)}")
        if self.class_column in ("image", "path", "id"):
            raise ValueError(
                f"class_column must be another name, a pool of images has a column {self.class_column} already"
            )
        return self

    def vector_of(self, column: str) -> str | None:
        """Return the vector that a column goes into, or None."""
        for name, vector in self.vectors.items():
            if any(fnmatch.fnmatchcase(column, pattern) for pattern in vector.columns):
                return name
        return None


def ingest_options(**settings: Any) -> IngestOptions:
    """Validate settings; see `IngestOptions`.

    Raises:
      ValueError: a setting that is not valid; a sentence for each.
    """
    return validated(IngestOptions, settings)
