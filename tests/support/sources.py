"""Source files for the tests of ingest, written without the code under test where that is possible."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import google_crc32c
from PIL import Image


def write_tfrecords(path: Path, records: Iterable[bytes]) -> list[int]:
    """Write a TFRecord file; return where each record begins."""
    starts, data = [], b""
    for record in records:
        starts.append(len(data))
        length = struct.pack("<Q", len(record))
        data += length + _check(length) + record + _check(record)
    path.write_bytes(data)
    return starts


def example(features: Mapping[str, Sequence[float] | Sequence[int] | Sequence[bytes]]) -> bytes:
    """Serialise a tf.Example by hand, from the wire format of protocol buffers."""
    entries = b""
    for name, values in features.items():
        if isinstance(values[0], bytes):
            feature = _field(1, b"".join(_field(1, value) for value in values))
        elif isinstance(values[0], float):
            feature = _field(2, _field(1, struct.pack(f"<{len(values)}f", *values)))
        else:
            feature = _field(3, _field(1, b"".join(_varint(value % 2**64) for value in values)))
        entries += _field(1, _field(1, name.encode()) + _field(2, feature))
    return _field(1, entries)


def png(shade: int) -> bytes:
    """Return a small grey image."""
    out = io.BytesIO()
    Image.new("L", (5, 4), shade).save(out, "PNG")
    return out.getvalue()


def _check(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out, value = out + bytes([value % 128 + 128]), value >> 7
    return out + bytes([value])
