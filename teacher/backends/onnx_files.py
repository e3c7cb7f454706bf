"""The contents of an ONNX file: where its weights lie, and what its classes are called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from distilbeam.teacher.protobuf_fields import integers, messages, read_fields, texts

# numbers of fields: ModelProto.graph 7, .functions 25; GraphProto.node 1, .initializer 5, .sparse_initializer 15;
# NodeProto.attribute 5, .op_type 4; FunctionProto.node 7; AttributeProto.name 1, .t 5, .g 6, .ints 8, .strings 9,
# .tensors 10, .graphs 11; TensorProto.external_data 13; SparseTensorProto.values 1, .indices 2;
# StringStringEntryProto.key 1, .value 2

_LABELS = ("classlabels_int64s", "classlabels_ints", "classlabels_strings")


def weight_files(model: Path) -> list[Path]:
    """List the files beside a model that it keeps its weights in, by the locations that it records.

    Args:
      model: the .onnx file.

    Returns:
      Paths in the model's folder, each once, in order.

    Raises:
      ValueError: a location lies outside of the model's folder, or there is no such file.
    """
    locations = sorted(set(_locations(model)))
    found = []
    for location in locations:
        path = model.parent / location
        if Path(location).is_absolute() or ".." in Path(location).parts:
            raise ValueError(
                f"teacher.model: {model} keeps weights in {location}, outside of its folder; put them beside it and save it again"
            )
        if not path.is_file():
            raise ValueError(
                f"teacher.model: {model} keeps weights in {location}, which is not beside it; copy it there"
            )
        if not path.resolve().is_relative_to(model.parent.resolve()):
            raise ValueError(
                f"teacher.model: {model} keeps weights in {location}, a link out of its folder; put the file itself there"
            )
        found.append(path)
    return found


def class_labels(model: Path) -> dict[int, list[str]]:
    """Find the names of the classes that classifiers of the ai.onnx.ml domain record.

    Returns:
      By number of classes; a number for which there are two lists is left out.
    """
    found: dict[int, list[str]] = {}
    doubtful: set[int] = set()
    for names in _labels(model):
        if found.setdefault(len(names), names) != names:
            doubtful.add(len(names))
    return {number: names for number, names in found.items() if number not in doubtful and number > 1}


def _labels(model: Path) -> Iterator[list[str]]:
    for node in _nodes_of(model.read_bytes()):
        for attribute in messages(node, 5):
            names = texts(attribute, 9) or [str(number) for number in integers(attribute, 8)]
            if names and "".join(texts(attribute, 1)) in _LABELS:
                yield names


def _nodes_of(data: bytes) -> Iterator[memoryview]:
    try:
        yield from messages(data, 7, 1)
    except ValueError:  # ONNX Runtime says what is wrong with it
        return


def _locations(model: Path) -> Iterator[str]:
    data = model.read_bytes()
    try:
        for graph in messages(data, 7):
            yield from _of_graph(graph)
        for node in messages(data, 25, 7):
            yield from _of_node(node)
    except ValueError:
        return


def _of_graph(graph: memoryview) -> Iterator[str]:
    for number, value in read_fields(graph):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            yield from _of_node(value)
        elif number == 5:
            yield from _of_tensor(value)
        elif number == 15:
            for tensor in (*messages(value, 1), *messages(value, 2)):
                yield from _of_tensor(tensor)


def _of_node(node: memoryview) -> Iterator[str]:
    for attribute in messages(node, 5):
        for number, value in read_fields(attribute):
            if isinstance(value, memoryview):
                if number in (5, 10):
                    yield from _of_tensor(value)
                elif number in (6, 11):
                    yield from _of_graph(value)


def _of_tensor(tensor: memoryview) -> Iterator[str]:
    for entry in messages(tensor, 13):
        if texts(entry, 1) == ["location"]:
            yield from texts(entry, 2)
