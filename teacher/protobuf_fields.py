"""Reading single fields of protocol buffers without their classes.

A message is a sequence of fields, each a number and a value: `read_fields` gives them as they stand, so that a few facts of
a large file are found by the numbers of its public schema, with no library and no copy of its weights.

Reference: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator

Value = int | memoryview


def read_fields(message: bytes | memoryview) -> Iterator[tuple[int, Value]]:
    """List the fields of a message.

    Args:
      message: the message as it is encoded on the wire.

    Returns:
      Number and value of each: an int for varints and fixed sizes, a view of the bytes for texts and messages.

    Raises:
      ValueError: not a protocol buffer.
    """
    data, place = memoryview(message), 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("it is no protocol buffer")
        if place + size > len(data):
            raise ValueError("it is cut off")
        part = data[place : place + size]
        yield number, part if kind == 2 else int.from_bytes(part, "little")
        place += size


def messages(message: bytes | memoryview, *numbers: int) -> Iterator[memoryview]:
    """List the messages or texts under a path of field numbers, each of which may be repeated."""
    if not numbers:
        yield memoryview(message)
        return
    for number, value in read_fields(message):
        if number == numbers[0] and isinstance(value, memoryview):
            yield from messages(value, *numbers[1:])


def texts(message: bytes | memoryview, *numbers: int) -> list[str]:
    """List the texts under a path of field numbers."""
    return [bytes(part).decode(errors="replace") for part in messages(message, *numbers)]


def integers(message: bytes | memoryview, number: int) -> list[int]:
    """List the repeated int64 of a field, packed or not."""
    found: list[int] = []
    for at, value in read_fields(message):
        if at != number:
            continue
        if isinstance(value, int):
            found.append(value)
            continue
        place = 0
        while place < len(value):
            one, place = _varint(value, place)
            found.append(one)
    return [value - 2**64 if value >= 2**63 else value for value in found]


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise ValueError("it is cut off or no protocol buffer")
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
