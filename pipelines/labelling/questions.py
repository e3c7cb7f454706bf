"""The digest of what a row asks the teacher: two rows with one digest get one answer.

The digest is of the values in the columns that the teacher reads, in its order, and of their types; names, other columns, files
and the way that values are encoded are no part of it. With the row's bytes as 16-bit numbers w it is, four times with other
coefficients a and constants c below 2^26 that depend on the types,

    c + sum of a[i] w[i]  modulo the prime 2^31 - 1,

which is a universal family of hashes: two rows that differ collide with a chance of at most 2^-104. All sums are of whole
numbers below 2^53, so that a product of float64 matrices gives them exactly on every processor. Cost: about 0.3 ns a byte for
numbers and vectors; strings, bytes and lists are hashed by BLAKE2b before, 1 to 2 µs a row.

Reference: Carter and Wegman, Universal classes of hash functions, 1979.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distilbeam.pipelines.pool.content_ids import cells, plain_encoding, type_name

Digests = npt.NDArray[np.uint64]  # [n, 2]

_PRIME = 2**31 - 1
_LANES = 1024  # of 16 bits, whose products with coefficients of 26 bits add up to at most 2^52
_BLOCK = 512  # rows at a time, so that the numbers stay in the processor's cache


def question_digests(rows: pa.Table | pa.RecordBatch, columns: Sequence[str]) -> Digests:
    """Digest what each row asks.

    Args:
      rows: the rows.
      columns: the columns that the teacher reads, in its order.

    Returns:
      uint64 [n, 2].
    """
    plain = [plain_encoding(rows.column(name)) for name in columns]
    kind = hashlib.blake2b("\n".join(type_name(column.type) for column in plain).encode(), digest_size=16).digest()
    constant = _factors(kind + b"types", 1).astype(np.int64)  # without it zeros of all types would be the same
    total = np.repeat(constant, rows.num_rows, axis=0)
    for number, column in enumerate(plain):
        seed = kind + number.to_bytes(4, "little")
        _add(total, _lanes(column), seed)
        if column.null_count:
            _add(total, _missing(column).astype(np.uint16)[:, None], seed + b"missing")
        if (items := _missing_items(column)) is not None:
            _add(total, items.astype(np.uint16), seed + b"items")
    return total.astype("<u4").view("<u8")


def _add(total: npt.NDArray[np.int64], lanes: npt.NDArray[np.uint16], seed: bytes) -> None:
    """Add what some 16-bit numbers of each row contribute, modulo the prime."""
    factors = _factors(seed, lanes.shape[1])
    for start in range(0, lanes.shape[1], _LANES):
        part = lanes[:, start : start + _LANES]
        sums = np.empty((len(part), 4))
        numbers = np.empty((_BLOCK, part.shape[1]))
        for first in range(0, len(part), _BLOCK):
            into = numbers[: len(part) - first]
            np.copyto(into, part[first : first + _BLOCK])
            np.matmul(into, factors[start : start + _LANES], out=sums[first : first + _BLOCK])
        total += sums.astype(np.int64)
        total %= _PRIME


@lru_cache(maxsize=64)
def _factors(seed: bytes, lanes: int) -> npt.NDArray[np.float64]:
    bits = np.frombuffer(hashlib.shake_128(seed).digest(lanes * 16), "<u4").reshape(lanes, 4)
    return (bits >> 6).astype(np.float64)


def _lanes(column: pa.Array) -> npt.NDArray[np.uint16]:
    """Give the bytes of each value as 16-bit numbers, uint16 [n, lanes]; what is missing has zeros."""
    data = _of_one_width(column)
    if data is None:
        hashed = [bytes(16) if c is None else hashlib.blake2b(c, digest_size=16).digest() for c in cells(column)]
        data = np.frombuffer(b"".join(hashed), np.uint8).reshape(len(column), 16)
    if data.shape[1] % 2:
        data = np.concatenate([data, np.zeros((len(data), 1), np.uint8)], axis=1)
    lanes: npt.NDArray[np.uint16] = data.view("<u2")
    return lanes


def _of_one_width(column: pa.Array) -> npt.NDArray[np.uint8] | None:
    """View values as bytes, uint8 [n, width], with zeros for what is missing; None for types without a width."""
    kind = column.type
    width = _byte_width(kind)
    if not width or not len(column):
        return np.empty((0, width), np.uint8) if width else None
    start, stop, values = column.offset, column.offset + len(column), column
    if pa.types.is_fixed_size_list(kind):
        values = column.values
        start, stop = start * kind.list_size + values.offset, stop * kind.list_size + values.offset
    item = _byte_width(values.type)
    buffer = values.buffers()[1] or b""
    data = np.frombuffer(buffer, np.uint8, (stop - start) * item, start * item).reshape(len(column), width)
    if column.null_count:
        data = np.where(_missing(column)[:, None], 0, data).astype(np.uint8)
    if (items := _missing_items(column)) is not None:
        data = np.where(np.repeat(items, item, axis=1), 0, data).astype(np.uint8)
    return data


def _byte_width(kind: pa.DataType) -> int:
    """Return the bytes of a value; 0 for types whose values are not some whole bytes each."""
    if pa.types.is_fixed_size_list(kind):
        return kind.list_size * _byte_width(kind.value_type) if pa.types.is_primitive(kind.value_type) else 0
    return kind.bit_width // 8 if pa.types.is_primitive(kind) or pa.types.is_fixed_size_binary(kind) else 0


def _missing(column: pa.Array) -> npt.NDArray[np.bool_]:
    missing: npt.NDArray[np.bool_] = column.is_null().to_numpy(zero_copy_only=False)
    return missing


def _missing_items(column: pa.Array) -> npt.NDArray[np.bool_] | None:
    """Tell which items of the vectors that are there are missing, bool [n, items]; None where all are there."""
    kind = column.type
    if not (pa.types.is_fixed_size_list(kind) and _byte_width(kind) and column.values.null_count):
        return None
    items = column.values.slice(column.offset * kind.list_size, len(column) * kind.list_size)
    missing = _missing(items).reshape(len(column), kind.list_size) & ~_missing(column)[:, None]
    return missing if missing.any() else None
