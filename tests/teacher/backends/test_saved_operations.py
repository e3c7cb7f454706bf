"""Operations of a SavedModel that reach out of it are found before TensorFlow loads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilbeam.teacher.backends.saved_operations import require_harmless
from distilbeam.teacher.protobuf_fields import integers, messages, read_fields, texts


def field(number: int, value: bytes | str | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value % 2**64)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def saved_model(folder: Path, outside: list[str], inside: list[str]) -> Path:
    nodes = b"".join(field(1, field(1, f"n{i}") + field(2, op)) for i, op in enumerate(outside))
    functions = field(1, b"".join(field(3, field(1, "n") + field(2, op)) for op in inside))
    folder.mkdir()
    graph = nodes + field(2, functions)
    (folder / "saved_model.pb").write_bytes(field(1, 1) + field(2, field(1, field(1, "serve")) + field(2, graph)))
    return folder


def test_arithmetic_is_harmless(tmp_path: Path) -> None:
    require_harmless(saved_model(tmp_path / "m", ["MatMul", "RestoreV2"], ["Softmax", "SaveV2"]))


@pytest.mark.parametrize("operation", ["WriteFile", "ReadFile", "PyFunc", "EagerPyFunc", "MatchingFiles"])
@pytest.mark.parametrize("inside", [True, False])
def test_what_reaches_out_is_refused(tmp_path: Path, operation: str, inside: bool) -> None:
    ops = (["MatMul"], ["Softmax", operation]) if inside else ([operation], ["Softmax"])
    with pytest.raises(
        ValueError, match=rf"read or write files or run code \({operation}\); say trust = true in \[teacher\]"
    ):
        require_harmless(saved_model(tmp_path / "m", *ops))


def test_what_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "m", ["MatMul"], [])
    data = (folder / "saved_model.pb").read_bytes()
    for damaged in (data[:-3], b"\xff" * 20, b"\x0b"):
        (folder / "saved_model.pb").write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a SavedModel whose operations can be looked at"):
            require_harmless(folder)
    (folder / "saved_model.pb").unlink()
    (folder / "saved_model.pbtxt").write_text("")
    with pytest.raises(ValueError, match=r"saved_model.pbtxt is text, of which nothing is looked at"):
        require_harmless(folder)


def test_fields_are_read_as_they_were_written() -> None:
    message = field(1, 300) + field(2, "text") + field(3, field(1, -5)) + field(4, varint(7) + varint(2**64 - 1))
    assert [number for number, _ in read_fields(message)] == [1, 2, 3, 4]
    assert next(iter(read_fields(message)))[1] == 300
    assert texts(message, 2) == ["text"]
    assert [bytes(part) for part in messages(message, 3)] == [field(1, -5)]
    assert integers(field(1, -5), 1) == [-5]
    assert integers(message, 4) == [7, -1]
