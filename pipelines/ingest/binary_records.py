"""TFRecord files of tf.Example, and image files, as records."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from distilbeam.pipelines.ingest.lines import DAMAGES, damage, open_source
from distilbeam.pipelines.ingest.records import Bad, Records, excerpt
from distilbeam.pipelines.ingest.sources import Block
from distilbeam.pipelines.ingest.tfrecord import features, read_tfrecords
from distilbeam.teacher.tfserving.messages import load_example

_RECORDS = 16_384  # records handed on at once
CONTENT_BYTES = 16


def example_records(block: Block) -> Iterator[Records]:
    """Read a block of a TFRecord file of tf.Example; TensorFlow is not imported."""
    name = block.source.name
    waiting: list[tuple[int, bytes]] = []
    damaged: list[Bad] = []
    number = block.first
    with open_source(block.source) as file:
        if block.start:
            file.seek(block.start)
        try:
            for data, intact in read_tfrecords(file, None if block.stop is None else block.stop - block.start):
                if intact:
                    waiting.append((number, data))
                else:
                    damaged.append(Bad(name, number, "the checksum of this record is wrong"))
                number += 1
                if len(waiting) == _RECORDS:
                    yield _parsed(name, waiting)
                    waiting = []
        except EOFError as e:
            damaged.append(Bad(name, number, f"{e}; what follows it in the file cannot be read"))
        except DAMAGES as e:
            damaged.append(damage(block.source, e))
    yield _parsed(name, waiting)
    yield Records(name, [], {}, [], damaged)


def image_records(block: Block, class_column: str | None) -> Iterator[Records]:
    """Read an image file: `image` (its bytes as they are), `path` and, where asked for, the name of its folder."""
    name, path = block.source.name, Path(block.source.path)
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
    except Exception as e:  # noqa: BLE001  # Pillow's readers raise whatever a damaged file makes them raise
        yield Records(name, [], {}, [], [Bad(name, None, f"not an image: {str(e) or type(e).__name__}")])
        return
    columns: dict[str, list[Any]] = {"image": [data], "path": [name]}
    if class_column:
        columns[class_column] = [path.parent.name]
    # where a file is named is not part of what it shows, but the folder is where it says what it shows
    content = _content({column: values[0] for column, values in columns.items() if column != "path"})
    yield Records(name, [0], columns, [content])


def _parsed(file: str, records: Iterable[tuple[int, bytes]]) -> Records:
    example = load_example()
    lines: list[int] = []
    rows: list[dict[str, Any]] = []
    bad: list[Bad] = []
    for line, data in records:
        try:
            rows.append(features(example.FromString(data)))
        except Exception as e:  # noqa: BLE001  # whatever is wrong with a record is kept beside it
            bad.append(Bad(file, line, str(e) or type(e).__name__, excerpt(data)))
        else:
            lines.append(line)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Records(file, lines, columns, [_content(row) for row in rows], bad)


def _content(row: dict[str, Any]) -> bytes:
    """Hash a record's values with their names and kinds; a feature without a value is none."""
    state = hashlib.blake2b(digest_size=CONTENT_BYTES)
    for name, value in sorted(row.items()):
        if value is None:
            continue
        kind = value.dtype.str if isinstance(value, np.ndarray) else type(value).__name__
        data = value.tobytes() if isinstance(value, np.ndarray) else value.encode() if isinstance(value, str) else value
        for part in (name.encode(), kind.encode(), data):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part)
    return state.digest()
