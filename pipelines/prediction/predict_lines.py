"""Predict JSON lines as they come: a line of the output for each line of the input, in the same order.

A line is answered as soon as it is there, so that a pipe's writer may wait for the answer before it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from distilbeam.pipelines.prediction.opened_model import Model
from distilbeam.pipelines.prediction.predict_files import PredictOptions, answered, wanted_of
from distilbeam.pipelines.prediction.rows import of_json
from distilbeam.pipelines.prediction.values import require_holds
from distilbeam.student.export.load import input_of
from distilbeam.student.predictions import require_free

_CHUNK_BYTES = 2**20
_DIGITS = 7  # of a float32


def predict_lines(model: Model, source: IO[bytes], sink: IO[bytes], options: PredictOptions) -> tuple[int, int]:
    """Predict what comes, until it ends.

    Args:
      model: a student or an export.
      source: JSON objects, one on each line; blank lines are passed over.
      sink: where the predictions go: the columns that are carried along as they came, and what `predict` gives.
      options: what is predicted and kept; `file_rows` and `format` are for files.

    Returns:
      Rows, and how many of them have no prediction.

    Raises:
      ValueError: the student reads what JSON cannot hold, or a carried column has a name of ours.
    """
    require_holds("jsonl", input_of(model))
    require_free(options.columns)
    rows = without = 0
    for lines in _arriving(source):
        for start in range(0, len(lines), options.batch_rows):
            some = lines[start : start + options.batch_rows]
            for answer in _answers(model, some, options):
                sink.write(_written(answer))
                rows, without = rows + 1, without + (answer["reason"] is not None)
        sink.flush()
    return rows, without


def _answers(model: Model, lines: Sequence[bytes], options: PredictOptions) -> Iterator[dict[str, Any]]:
    read, objects = of_json(lines, wanted_of(model, options))
    said = answered(model, read, options).to_pylist()
    for value, answer in zip(objects, said, strict=True):
        yield {name: value.get(name) for name in options.columns} | answer


def _arriving(source: IO[bytes]) -> Iterator[list[bytes]]:
    """Give the whole lines that are there, as soon as there is one."""
    begun: list[bytes] = []  # pieces of a line whose end has not come
    read = getattr(source, "read1", source.read)
    while chunk := read(_CHUNK_BYTES):
        whole, end, rest = chunk.rpartition(b"\n")
        if end:
            lines = b"".join([*begun, whole]).split(b"\n")
            begun = []
            yield [line for line in lines if line.strip()]
        if rest:
            begun.append(rest)
    if (last := b"".join(begun)).strip():
        yield [last]


def _written(answer: Mapping[str, Any]) -> bytes:
    rounded = {
        name: _rounded(value) if name in ("confidence", "top_probabilities", "logits") else value
        for name, value in answer.items()
    }
    try:
        return (json.dumps(rounded, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can hold
        return (json.dumps(rounded) + "\n").encode()


def _rounded(value: Any) -> Any:
    """Write no more digits than a float32 has."""
    if isinstance(value, list):
        return [_rounded(number) for number in value]
    return None if value is None else float(f"{value:.{_DIGITS}g}")
