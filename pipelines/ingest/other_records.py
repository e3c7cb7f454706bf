"""JSON lines, TFRecord files of tf.Example, text lines and image files as records."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distilbeam.pipelines.ingest.records import Bad, Records, excerpt
from distilbeam.pipelines.ingest.sources import Block, line_chunks, open_block
from distilbeam.pipelines.ingest.tfrecord import features, read_tfrecords
from distilbeam.teacher.tfserving.messages import load_example

_RECORDS = 16_384  # records handed on at once


def json_records(block: Block) -> Iterator[Records]:
    """Read a block of JSON lines; lists of numbers of one shape become arrays."""
    for line, data in line_chunks(block):
        yield _parsed(block, _lines(line, data), _json_object)


def text_records(block: Block) -> Iterator[Records]:
    """Read a block of text: a line that is not blank is an example, in the column `text`."""
    for line, data in line_chunks(block):
        yield _parsed(block, _lines(line, data), _text_line)


def example_records(block: Block) -> Iterator[Records]:
    """Read a block of a TFRecord file of tf.Example; TensorFlow is not imported."""
    example = load_example()
    waiting: list[tuple[int, bytes]] = []
    damaged: list[Bad] = []
    number = block.first
    with open_block(block) as file:
        try:
            for data, intact in read_tfrecords(file, None if block.stop is None else block.stop - block.start):
                if intact:
                    waiting.append((number, data))
                else:
                    damaged.append(Bad(block.source.name, number, "the checksum of this record is wrong"))
                number += 1
                if len(waiting) == _RECORDS:
                    yield _parsed(block, waiting, lambda text: features(example.FromString(text)))
                    waiting = []
        except EOFError as e:
            damaged.append(Bad(block.source.name, number, f"{e}; what follows it in the file cannot be read"))
    yield _parsed(block, waiting, lambda text: features(example.FromString(text)))
    yield Records(block.source.name, [], {}, damaged)


def image_records(block: Block, class_column: str | None) -> Iterator[Records]:
    """Read an image file: `image` (its bytes as they are), `path` and, where asked for, the name of its folder."""
    name, path = block.source.name, Path(block.source.path)
    data = path.read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
    except Exception as e:  # noqa: BLE001  # Pillow's readers raise whatever a damaged file makes them raise
        yield Records(name, [], {}, [Bad(name, None, f"not an image: {str(e) or type(e).__name__}")])
        return
    columns: dict[str, list[Any]] = {"image": [data], "path": [name]}
    yield Records(name, [0], columns | ({class_column: [path.parent.name]} if class_column else {}))


def _lines(first: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in enumerate(data.split(b"\n"), first) if line and not line.isspace())


def _parsed(block: Block, records: Iterable[tuple[int, bytes]], parse: Callable[[bytes], dict[str, Any]]) -> Records:
    lines: list[int] = []
    rows: list[dict[str, Any]] = []
    bad: list[Bad] = []
    for line, data in records:
        try:
            rows.append(parse(data))
        except Exception as e:  # noqa: BLE001  # whatever is wrong with a record is kept beside it
            bad.append(Bad(block.source.name, line, _sentence(e), excerpt(data)))
        else:
            lines.append(line)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Records(block.source.name, lines, columns, bad)


def _json_object(data: bytes) -> dict[str, Any]:
    value = json.loads(data.decode("utf-8-sig"))
    if not isinstance(value, dict):
        raise ValueError(f"a line must be a JSON object, got {type(value).__name__}")
    return {name: _array(item) if isinstance(item, list) else item for name, item in value.items()}


def _array(items: list[Any]) -> Any:
    """Turn a list of numbers, or lists of them of one length, into an array; leave any other list as it is."""
    try:
        array = np.array(items)
    except ValueError:
        return items
    return array if array.dtype.kind in "if" and array.size else items


def _text_line(data: bytes) -> dict[str, Any]:
    return {"text": data.decode("utf-8-sig").rstrip("\r")}


def _sentence(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    if isinstance(error, UnicodeDecodeError):
        return f"the text must be UTF-8: {error}"
    return str(error) or type(error).__name__
