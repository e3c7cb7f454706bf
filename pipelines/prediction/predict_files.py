"""Predict files of examples into a folder of Parquet, file by file; what is there already is not predicted again.

A file of the output has consecutive rows of one file of examples, or of the images of a folder, in their order: `source_file`,
`source_row` (from 0), the columns that are carried along, and what `student.predictions.Predictor.predict` gives. A folder of images
is predicted again when one of them is another one, or when there are more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from distilbeam.pipelines.prediction.data_files import DataFile, find_data
from distilbeam.pipelines.prediction.opened_model import Model
from distilbeam.pipelines.prediction.output_folder import PLACES, OutputFolder
from distilbeam.pipelines.prediction.rows import Rows, Wanted, read_rows
from distilbeam.progress import Progress
from distilbeam.storage.paths import is_remote
from distilbeam.storage.stores import store_of
from distilbeam.student.export.load import input_of
from distilbeam.student.predictions import BATCH_ROWS, require_free, without_prediction

FILE_ROWS = 65_536
FILE_BYTES = 64 * 2**20  # of predictions in memory, where they have many classes


@dataclass(frozen=True)
class PredictOptions:
    """What is predicted and kept.

    Attributes:
      top_k: give the k most probable classes too.
      logits: give the logits too.
      columns: columns of the examples that are carried along.
      batch_rows: most rows whose inputs are in memory at a time.
      file_rows: most rows of a file of the output.
      format: of all files; by each one's name without it.
    """

    top_k: int | None = None
    logits: bool = False
    columns: tuple[str, ...] = ()
    batch_rows: int = BATCH_ROWS
    file_rows: int = FILE_ROWS
    format: str | None = None


@dataclass(frozen=True)
class PredictSummary:
    """What came of a call.

    Attributes:
      files, rows: of examples, all of them; an image is a file.
      predicted: rows that this call has predicted.
      without: rows that have no prediction.
      first: `source_file`, `source_row` and `reason` of the first of these.
      changed: files whose content was another one before, and that were predicted again.
      gone: files that are not named any more; their predictions stay.
    """

    files: int
    rows: int
    predicted: int
    without: int
    first: dict[str, Any] | None
    changed: tuple[str, ...]
    gone: tuple[str, ...]


def predict_files(
    model: Model, places: Sequence[str], out: str | Path, options: PredictOptions, progress: Progress | None = None
) -> PredictSummary:
    """Predict files of examples, or what is left of them.

    Args:
      model: a student or an export.
      places: paths, directories and glob patterns of Parquet, CSV, JSON lines, text and images.
      out: folder of the predictions; one that is there must have been made by the same model with the same options.
      options: what is predicted and kept.
      progress: told of files that are done.

    Returns:
      What came of it.

    Raises:
      ValueError: a file that cannot be read, a column that is missing or has a name of ours, a file that changed while it was
        read, or an output folder of something else. What was predicted before stays.
    """
    progress = progress or Progress()
    if is_remote(out):
        raise ValueError(f"--out must be a folder of this machine, got {out}; copy it where it is wanted afterwards")
    root = Path(out).resolve()
    require_free(options.columns, PLACES)
    files = find_data(places, options.format, root, input_of(model).kind == "image")
    with store_of(root).hold(root, "--out", "--out"):
        folder = OutputFolder(root, _about(model, options))
        schema = folder.schema()
        predicted, changed = 0, []
        for number, file in enumerate(files):
            progress.step(number, len(files), f"{predicted:,} rows")
            start, another = folder.begin(file.source)
            changed += [file.source.path] if another else []
            if start is None:
                continue
            row = start
            for table in _gathered(_answers(model, file, start, options), options.file_rows):
                schema = schema or _without_nulls(table.schema)
                images = file.images[row : row + table.num_rows]
                folder.write(file.source, row, _cast(table, schema, file), images)
                row += table.num_rows
                predicted += table.num_rows
                progress.step(number, len(files), f"{predicted:,} rows")
            if file.changed():
                raise ValueError(f"{file.source.path} was changed while it was read; give the same command again")
            folder.finish(file.source, row)
        sources = [file.source for file in files]
        rows, without, first = folder.counts(sources)
        progress.step(len(files), len(files), f"{predicted:,} rows")
        count = sum(len(file.images) or 1 for file in files)
        return PredictSummary(count, rows, predicted, without, first, tuple(changed), tuple(folder.gone(sources)))


def wanted_of(model: Model, options: PredictOptions) -> Wanted:
    """Say which columns of examples are read for a model."""
    return Wanted(input_of(model), model.input_shape, options.columns, options.batch_rows)


def answered(model: Model, rows: Rows, options: PredictOptions) -> pa.Table:
    """Predict rows that were read."""
    said = model.predict(rows.input, top_k=options.top_k, logits=options.logits, batch_rows=options.batch_rows)
    return without_prediction(said, rows.reasons)


def _answers(model: Model, file: DataFile, start: int, options: PredictOptions) -> Iterator[pa.Table]:
    for rows in read_rows(file, start, wanted_of(model, options)):
        said = answered(model, rows, options)
        fields = [*rows.carried.schema, *said.schema]  # which keep what they say of bytes that are numbers
        yield pa.Table.from_arrays([*rows.carried.columns, *said.columns], schema=pa.schema(fields))


def _gathered(tables: Iterator[pa.Table], file_rows: int) -> Iterator[pa.Table]:
    """Put tables together until they have enough rows or bytes; cut one that has too many."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += table.num_rows
        while rows >= file_rows or sum(part.nbytes for part in waiting) >= FILE_BYTES:
            whole = pa.concat_tables(waiting, promote_options="permissive")
            yield whole.slice(0, file_rows)
            left = whole.slice(file_rows)
            rows, waiting = left.num_rows, [left] if left.num_rows else []
    if rows:
        yield pa.concat_tables(waiting, promote_options="permissive")


def _about(model: Model, options: PredictOptions) -> dict[str, Any]:
    return {
        "model": model.fingerprint(),
        "classes": list(model.classes),
        "top_k": options.top_k,
        "logits": options.logits,
        "columns": list(options.columns),
    }


def _without_nulls(schema: pa.Schema) -> pa.Schema:
    """Take a carried column without any value for text."""
    return pa.schema([f.with_type(pa.string()) if pa.types.is_null(f.type) else f for f in schema])


def _cast(table: pa.Table, schema: pa.Schema, file: DataFile) -> pa.Table:
    """Give the carried columns the types that those of the first file have."""
    for place, field in enumerate(schema):
        if table.schema.field(place).type != field.type:
            try:
                table = table.set_column(place, field, table[field.name].cast(field.type))
            except pa.ArrowException as e:
                raise ValueError(
                    f"--columns: {field.name} is {table.schema.field(place).type} in {file.source.path} and {field.type} in "
                    "what was predicted before; leave it out, or predict these files into another folder"
                ) from e
    return table
