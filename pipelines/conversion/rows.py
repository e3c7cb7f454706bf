"""Rows of other trainers' data sets of log-probabilities, read as streams from JSON lines and Parquet.

* `axolotl`: `input_ids`, `attention_mask`, `labels` (-100 for what is given), `target_token_ids`, `target_logprobs` (or
  `logprobs`) and `target_mask`, lists of lists; or `logprobs` alone, lists of `{"token": "token_id:12", "logprob": -.5}`. Where
  there are fewer lists than tokens they are those of the last tokens.
* `distillkit`: `input_ids`, `compressed_logprobs` and `bytepacked_indices`, lists of bytes for each token (see distillkit), or
  `token_ids` and `top_values` as they are; Parquet, or the Arrow files of a folder of `datasets`. In rows that DistillKit packed
  `attention_mask` numbers the texts, each of which is a row here.
* `lists`: `input_ids`, `token_ids` and `logprobs`, lists of lists, the first of which belongs to the first token; `attention_mask`
  and `labels` where they are.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distilbeam.pipelines.ingest.sources import COMPRESSED, Source

if TYPE_CHECKING:
    from distilbeam.pipelines.conversion.distillkit import Compression

Form = Literal["axolotl", "distillkit", "lists"]
FORMS: tuple[Form, ...] = ("axolotl", "distillkit", "lists")
NEVER = -1e8  # axolotl fills with -1e9 and -inf: a log-probability below this one is none
IGNORED = -100
_GIVEN = ("input_ids", "attention_mask", "labels")
_TARGETS: Mapping[Form, tuple[str, ...]] = {
    "axolotl": ("target_logprobs", "logprobs", "target_token_ids", "target_mask"),
    "distillkit": ("compressed_logprobs", "bytepacked_indices", "top_values", "token_ids", "packed_indices"),
    "lists": ("logprobs", "token_ids"),
}
_LOGPROBS: Mapping[Form, tuple[str, ...]] = {
    "axolotl": ("target_logprobs", "logprobs"),
    "distillkit": ("top_values", "compressed_logprobs"),
    "lists": ("logprobs",),
}
_COLUMNS = tuple(dict.fromkeys((*_GIVEN, *(name for names in _TARGETS.values() for name in names))))
_BATCH_BYTES = 2**26
_BATCH_ROWS = 1024
_READ_BYTES = 2**20
Ints = npt.NDArray[np.int64]
Number = TypeVar("Number", np.int64, np.float64)


@dataclass(frozen=True)
class PeerRow:
    """One text with log-probabilities, as another trainer stores it.

    Attributes:
      where: file and number of the row, from 1, for messages.
      number: that number; where a row holds several texts, the text's in the file.
      ids: int64 [T], its tokens.
      seen: bool [T], whether they are of the text: no padding.
      predicted: bool [T], whether they are to be predicted.
      classes: int64 [R, K], -1 where there is none.
      logprobs: float64 [R, K], -inf where there is none.
      first: the token that the first of the R lists belongs to.
    """

    where: str
    number: int
    ids: Ints
    seen: npt.NDArray[np.bool_]
    predicted: npt.NDArray[np.bool_]
    classes: Ints
    logprobs: npt.NDArray[np.float64]
    first: int


def read_rows(source: Source, form: Form, compression: Compression | None = None) -> Iterator[PeerRow]:
    """Read the rows of a file, some at a time.

    Args:
      source: JSON lines (.gz and .zst are unpacked), Parquet or Arrow.
      form: which columns hold what.
      compression: how `compressed_logprobs` were made, where there are such.

    Yields:
      The rows in the file's order.

    Raises:
      ValueError: a column is missing, lists do not fit each other, or the file is damaged; the message names the row.
    """
    name = source.path.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    columnar = {".parquet": _parquet, ".arrow": _arrow}.get(Path(name).suffix)
    records = columnar(source, form) if columnar else _json_lines(source)
    texts = 0
    try:
        for number, record in enumerate(records, 1):
            where = f"{source.path} row {number:,}"
            try:
                row = _row(record, form, where, number, compression)
            except (pa.ArrowException, AttributeError, TypeError) as e:
                raise ValueError(
                    f"{where}: its columns must be lists of numbers in the form '{form}' ({_brief(e)})"
                ) from e
            if form != "distillkit":
                yield row
                continue
            for text in _apart(row, record):
                yield replace(text, number=(texts := texts + 1))
    except (OSError, pa.ArrowException) as e:
        raise ValueError(f"SOURCE: {source.path} cannot be read ({_brief(e)}); write it again or leave it out") from e


def _parquet(source: Source, form: Form) -> Iterator[dict[str, pa.Array]]:
    with pq.ParquetFile(Path(source.path)) as file:
        names = _names(file.schema_arrow.names, source, form)
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * max(1, file.metadata.num_rows) // max(1, size)))
        for batch in file.iter_batches(rows, columns=names):
            yield from _records(batch, names)


def _arrow(source: Source, form: Form) -> Iterator[dict[str, pa.Array]]:
    with pa.memory_map(source.path) as file:  # datasets writes streams, others files
        try:
            reader = pa.ipc.open_stream(file)
            batches: Iterator[pa.RecordBatch] = iter(reader)
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file(file)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        names = _names(reader.schema.names, source, form)
        for batch in batches:
            yield from _records(batch, names)


def _names(there: list[str], source: Source, form: Form) -> list[str]:
    names = [name for name in there if name in (*_GIVEN, *_TARGETS[form])]
    if "input_ids" not in names:
        raise ValueError(_missing(source.path, form, "input_ids", there))
    return names


def _records(batch: pa.RecordBatch, names: list[str]) -> Iterator[dict[str, pa.Array]]:
    for i in range(batch.num_rows):
        scalars = {name: batch.column(name)[i] for name in names}
        yield {name: scalar.values for name, scalar in scalars.items() if scalar.is_valid}


def _json_lines(source: Source) -> Iterator[dict[str, pa.Array]]:
    opened = pa.input_stream(source.path, compression="detect", buffer_size=_READ_BYTES)
    with io.BufferedReader(opened, _READ_BYTES) as lines:
        for number, line in enumerate(lines, 1):
            try:
                found = json.loads(line)
                wanted = (name for name in _COLUMNS if found.get(name) is not None)
                yield {name: pa.array(found[name]) for name in wanted}
            except (ValueError, TypeError, AttributeError, pa.ArrowException) as e:
                raise ValueError(
                    f"{source.path} row {number:,} must be a line with a JSON object of lists of numbers: {_brief(e)}"
                ) from e


def _row(
    record: Mapping[str, pa.Array], form: Form, where: str, number: int, compression: Compression | None
) -> PeerRow:
    if "input_ids" not in record:
        raise ValueError(_missing(where, form, "input_ids", record))
    ids = _ints(record["input_ids"])
    seen = _ints(record["attention_mask"]) > 0 if "attention_mask" in record else np.ones(len(ids), bool)
    predicted = _ints(record["labels"]) != IGNORED if "labels" in record else np.ones(len(ids), bool)
    for name, array in (("attention_mask", seen), ("labels", predicted)):
        if len(array) != len(ids):
            raise ValueError(
                f"{where}: {name} must have one value for each of the {len(ids):,} tokens, got {len(array):,}"
            )
    if "packed_indices" in record or "compressed_logprobs" in record:
        from distilbeam.pipelines.conversion.distillkit import decode_record

        classes, logprobs = decode_record(record, compression, where)
    else:
        classes, logprobs = _targets(record, form, where)
    if len(classes) > len(ids):
        raise ValueError(
            f"{where}: it must have at most one list for each of the {len(ids):,} tokens, got {len(classes):,}"
        )
    if np.isnan(logprobs).any():
        raise ValueError(f"{where}: log-probabilities must be numbers, one is NaN")
    none = logprobs <= NEVER
    first = len(ids) - len(classes) if form == "axolotl" else 0
    classes, logprobs = np.where(none, -1, classes), np.where(none, -np.inf, logprobs)
    return PeerRow(where, number, ids, seen, predicted, classes, logprobs, first)


def _apart(row: PeerRow, record: Mapping[str, pa.Array]) -> Iterator[PeerRow]:
    """Part a row that was packed into its texts, which `attention_mask` numbers from 1; another mask has one."""
    numbers = _ints(record["attention_mask"]) if "attention_mask" in record else np.ones(len(row.ids), np.int64)
    begins = np.flatnonzero(np.r_[True, np.diff(numbers) != 0])
    pieces = [slice(a, b) for a, b in zip(begins, [*begins[1:], len(numbers)], strict=True) if numbers[a] > 0]
    for place, here in enumerate(pieces, 1):
        where = row.where if len(pieces) == 1 else f"{row.where}, text {place:,}"
        parts = {name: getattr(row, name)[here] for name in ("ids", "seen", "predicted", "classes", "logprobs")}
        yield replace(row, where=where, **parts)


def _targets(record: Mapping[str, pa.Array], form: Form, where: str) -> tuple[Ints, npt.NDArray[np.float64]]:
    named = next((name for name in _LOGPROBS[form] if name in record), None)
    if named is None:
        raise ValueError(_missing(where, form, _LOGPROBS[form][-1], record))
    lengths, values = _ragged(record[named])
    ids_name = "target_token_ids" if form == "axolotl" else "token_ids"
    if pa.types.is_struct(values.type):  # what servers answer, as it was stored
        ids = _ids_of(pc.struct_field(values, "token"), where)
        values = pc.struct_field(values, "logprob")
    elif ids_name in record:
        ids = _same_lists(record[ids_name], lengths, ids_name, where)
    elif not len(values):
        ids = values
    else:
        raise ValueError(_missing(where, form, ids_name, record))
    classes = _padded(lengths, _ints(ids), -1)
    logprobs = _padded(lengths, values.to_numpy(zero_copy_only=False).astype(np.float64), -np.inf)
    if "target_mask" in record and form == "axolotl":
        mask = _padded(lengths, _ints(_same_lists(record["target_mask"], lengths, "target_mask", where)), 0)
        logprobs = np.where(mask > 0, logprobs, -np.inf)
    return classes, logprobs


def _ids_of(tokens: pa.Array, where: str) -> pa.Array:
    try:
        return pc.cast(pc.replace_substring(tokens, "token_id:", ""), pa.int64())
    except pa.ArrowInvalid as e:
        raise ValueError(
            f"{where}: each log-probability must name its token as 'token_id:12' ({_brief(e)}); texts of tokens are ambiguous"
        ) from e


def _same_lists(array: pa.Array, lengths: Ints, name: str, where: str) -> pa.Array:
    found, values = _ragged(array)
    if not np.array_equal(found, lengths):
        raise ValueError(f"{where}: {name} must have one value for each log-probability, list by list; it has others")
    return values


def _ragged(array: pa.Array) -> tuple[Ints, pa.Array]:
    """Return the lengths of lists, 0 for missing ones, and their values one after another."""
    if pa.types.is_null(array.type):
        return np.zeros(len(array), np.int64), pa.array([], pa.float64())
    return _ints(pc.fill_null(pc.list_value_length(array), 0)), array.flatten()


def _padded(lengths: Ints, values: npt.NDArray[Number], fill: float) -> npt.NDArray[Number]:
    width = int(lengths.max(initial=0))
    padded = np.full((len(lengths), width), fill, values.dtype)
    padded[np.arange(width) < lengths[:, None]] = values
    return padded


def _ints(array: pa.Array) -> Ints:
    if array.null_count:
        raise ValueError("its lists must have no missing numbers")
    found: Ints = array.to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _missing(where: str, form: Form, name: str, columns: object) -> str:
    there = ", ".join(map(str, columns)) if isinstance(columns, (list, Mapping)) else ""
    return (
        f"{where}: the form '{form}' must have {name}, the columns are {there or 'none of its own'}; --from names another form, "
        "and text must be tokenised by the trainer that it was prepared for"
    )


def _brief(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
