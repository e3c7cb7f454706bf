"""The TFRecord container, and tf.Example without TensorFlow.

A record is its length (uint64, little endian), the masked CRC-32C of these 8 bytes, the data, and the masked CRC-32C of the
data (tensorflow/core/lib/io/record_writer.h). Damaged data costs one record; a damaged length hides where the next record
begins, and so costs the rest of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from gzip import GzipFile
from typing import IO, Any

import numpy as np

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


def read_tfrecords(file: IO[bytes] | GzipFile, size: int | None) -> Iterator[tuple[bytes, bool]]:
    """Read records.

    Args:
      file: an open file, at the beginning of a record.
      size: bytes to read, or None for all.

    Yields:
      The data of a record, and whether its checksum is right.

    Raises:
      EOFError: the file ends within a record, or a length is damaged.
    """
    read = 0
    while (size is None or read < size) and (header := _exactly(file, _HEADER.size)):
        if len(header) < _HEADER.size:
            raise EOFError("the file ends within this record")
        length, check = _HEADER.unpack(header)
        if check != masked_crc(header[:8]):
            raise EOFError("the length of this record is damaged")
        data = _exactly(file, length)
        footer = _exactly(file, _FOOTER.size)
        if len(data) < length or len(footer) < _FOOTER.size:
            raise EOFError("the file ends within this record")
        read += _HEADER.size + length + _FOOTER.size
        yield data, _FOOTER.unpack(footer)[0] == masked_crc(data)


def record_starts(file: IO[bytes]) -> Iterator[int]:
    """Walk over the lengths of a file that can seek and yield where each record begins; stops where it is damaged."""
    start = 0
    while len(header := file.read(_HEADER.size)) == _HEADER.size:
        length, check = _HEADER.unpack(header)
        if check != masked_crc(header[:8]):
            return
        yield start
        start += _HEADER.size + length + _FOOTER.size
        file.seek(start)


def require_checksums() -> None:
    """Raise `ValueError` with the command that installs what computes checksums, where it is missing."""
    masked_crc(b"")


def masked_crc(data: bytes) -> int:
    """Return the masked CRC-32C of the format: rotated right by 15 bits, plus a constant.

    Raises:
      ValueError: google-crc32c is not installed.
    """
    try:
        import google_crc32c
    except ImportError as e:
        raise ValueError("TFRecord files need google-crc32c: pip install 'distilbeam[tfrecord]'") from e
    crc: int = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def features(message: Any) -> dict[str, Any]:
    """Turn a tf.Example into values: bytes, or an array of the numbers of a feature, which may be none or one.

    Raises:
      ValueError: a feature with more than one byte string.
    """
    # a protocol buffer's map has an order of its own in every process; the pool's columns are to have one
    return {name: _value(name, feature) for name, feature in sorted(message.features.feature.items())}


def _value(name: str, feature: Any) -> Any:
    kind = feature.WhichOneof("kind")
    values = () if kind is None else getattr(feature, kind).value
    if kind in ("float_list", "int64_list"):
        return np.array(values, np.float32 if kind == "float_list" else np.int64)
    if len(values) > 1:
        raise ValueError(f"feature {name} must be one byte string, got {len(values)}")
    return values[0] if values else None


def _exactly(file: IO[bytes] | GzipFile, count: int) -> bytes:
    """Read `count` bytes, or what is left; a length that promises more than there is does not ask for the memory."""
    parts: list[bytes] = []
    while count and (part := file.read(min(count, 1 << 24))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
