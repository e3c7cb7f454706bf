"""Class labels: what the values of a label column mean, read alike by runs, trainings and evaluations.

A value names its class. Text stands as it is, bytes are UTF-8, whole numbers (also in float and decimal columns) are their
digits, booleans `false` and `true`; a number means the class whose name is that number, be it written "1", "01" or "1.0".
Whole numbers can be indices among the classes too. They are what fits all of them: names or indices. Where both fit and
differ, nothing is assumed: the reading must be known (a student remembers that of its training), or the labels be text.

Classes that are found in the data are in natural order: numerals by their value, then other text by its code points.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Integers = Literal["names", "indices"]
INTEGERS = "integer_labels"  # where a student remembers what whole numbers meant in its training

_NUMERAL = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
_EXACT = 2**53  # whole numbers up to here are themselves as float64
_UNKNOWN, _SEVERAL = -1, -2


class LabelError(ValueError):
    """A value that names no class.

    Attributes:
      row: its row in the column.
      value: the value, for a message.
      problem: what is wrong with it, as in "which is missing".
    """

    def __init__(self, row: int, value: object, problem: str) -> None:
        super().__init__(f"the value {value!r} in row {row:,} {problem}")
        self.row, self.value, self.problem = row, value, problem


@dataclass(frozen=True)
class ClassLabels:
    """The values of a label column.

    Attributes:
      texts: string [n], names of classes.
      numbers: int64 [n], where the column holds whole numbers; else None.
      boolean: whether it holds booleans.
    """

    texts: pa.Array
    numbers: npt.NDArray[np.int64] | None = None
    boolean: bool = False


def parse_labels(column: pa.ChunkedArray | pa.Array, name: str) -> ClassLabels:
    """Read a label column of any type that can name classes.

    Args:
      column: text, bytes, whole numbers (integers, or floats and decimals without a fraction), booleans, dates, or a
        dictionary of such.
      name: what to call the column in errors.

    Raises:
      LabelError: a value is missing or names no class.
      ValueError: the type holds no names.
    """
    values = _plain(column)
    missing = pc.is_null(values, nan_is_null=True)
    if pc.any(missing).as_py():
        raise LabelError(pc.index(missing, True).as_py(), None, "is missing")
    type_ = values.type
    if pa.types.is_boolean(type_):
        return ClassLabels(values.cast(pa.string()), boolean=True)
    if pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_):
        numbers = _whole_numbers(values)
        return ClassLabels(pa.array(numbers).cast(pa.string()), numbers)
    if _holds_bytes(type_):
        return ClassLabels(_utf8(values))
    if pa.types.is_temporal(type_) or _holds_text(type_):
        return ClassLabels(values.cast(pa.string()))
    raise ValueError(f"{name} must hold text, whole numbers or booleans, which name classes, got {type_}")


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort names: numerals by their value, then other text by its code points.

    Example:
      >>> natural_order(["b", "10", "9", "-1", "a"])
      ('-1', '9', '10', 'a', 'b')
    """
    return tuple(sorted(names, key=_natural_key))


def is_numeral(name: str) -> bool:
    """Tell whether a class's name is a number."""
    return _NUMERAL.fullmatch(name) is not None


def find_classes(labels: Sequence[ClassLabels], name: str) -> tuple[str, ...]:
    """List the classes that label columns name, in natural order.

    Args:
      labels: the columns.
      name: what to call them in errors.

    Raises:
      ValueError: fewer than two, booleans beside other values, or two spellings of one number.
    """
    names = natural_order(pa.chunked_array([one.texts for one in labels], pa.string()).unique().to_pylist())
    if any(one.boolean for one in labels) and not set(names) <= {"false", "true"}:
        raise ValueError(
            f"{name} must hold booleans in all labelled sets or in none, found {brief(names)}; write it alike in all of them"
        )
    if len(names) < 2:
        raise ValueError(
            f"{name} must name at least two classes in the labelled sets, found {names[0] if names else 'none'}"
        )
    seen: dict[Decimal, str] = {}
    for numeral in filter(is_numeral, names):
        other = seen.setdefault(Decimal(numeral), numeral)
        if other != numeral:
            raise ValueError(
                f"{name}: {other!r} and {numeral!r} are one number; write it alike in all sets, or name both in data.classes"
            )
    return names


def reading_of(labels: Sequence[ClassLabels], classes: Sequence[str], name: str) -> Integers | None:
    """Tell what whole numbers mean in label columns that belong together.

    Args:
      labels: the columns.
      classes: names of the classes, in order.
      name: what to call the columns in errors.

    Returns:
      "names" or "indices"; None where there are no whole numbers, or where both are the same or neither fits.

    Raises:
      ValueError: both fit, and mean different classes.
    """
    columns = [one.numbers for one in labels if one.numbers is not None]
    if not columns:
        return None
    values = np.unique(np.concatenate(columns))
    named, indexed = _named(values, classes), _indexed(values, classes)
    if not len(values) or np.array_equal(named, indexed):
        return None
    names_fit, indices_fit = bool((named >= 0).all()), bool((indexed >= 0).all())
    if names_fit and indices_fit:
        value = values[np.flatnonzero(named != indexed)[0]]
        raise ValueError(
            f"{name}: {value} is the name of a class and also the index of class {classes[value]!r}; write the labels as text, "
            "which is always a name, or say which in the setting data.integers (names or indices)"
        )
    return "names" if names_fit else "indices" if indices_fit else None


def indices_of(
    labels: ClassLabels, classes: Sequence[str], integers: Integers | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.intp]]:
    """Bring labels to the indices of their classes.

    Args:
      labels: the column.
      classes: names of the classes, in order.
      integers: what whole numbers mean; see `reading_of`. None where they are the same, or names for want of a better.

    Returns:
      int64 [n]; and the rows of no class, ascending.
    """
    if labels.numbers is None:
        found = _of_booleans(labels.texts, classes) if labels.boolean else _of_texts(labels.texts, classes)
    else:
        values, inverse = np.unique(labels.numbers, return_inverse=True)
        numeral = any(map(is_numeral, classes))
        by_index = integers == "indices" or (integers is None and not numeral)
        found = (_indexed if by_index else _named)(values, classes)[inverse]
    return found, np.flatnonzero(found < 0)


def brief(classes: Sequence[str]) -> str:
    """List some of the classes."""
    return ", ".join(classes) if len(classes) <= 12 else f"{', '.join(classes[:10])}, ..., {classes[-1]}"


def _plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return the values as one array without a dictionary, runs or an extension type."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(values, pa.ChunkedArray):  # of no chunk, or too long for one
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_run_end_encoded(values.type):
        values = pc.run_end_decode(values)
    return values


def _holds_text(type_: pa.DataType) -> bool:
    return bool(pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_))


def _holds_bytes(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(is_kind(type_) for is_kind in kinds)


def _whole_numbers(values: pa.Array) -> npt.NDArray[np.int64]:
    if pa.types.is_decimal(values.type):
        exact = values.to_pylist()
        bad = [i for i, value in enumerate(exact) if value != value.to_integral_value() or abs(value) >= _EXACT]
        array = np.array([] if bad else [int(value) for value in exact], np.int64)
    else:
        array = values.to_numpy(zero_copy_only=False)
        bad = np.flatnonzero((np.trunc(array) != array) | (np.abs(array.astype(np.float64)) >= _EXACT)).tolist()
    if bad:
        raise LabelError(
            bad[0], values[bad[0]].as_py(), "is no whole number below 2^53; classes of other names are text"
        )
    return array.astype(np.int64)


def _utf8(values: pa.Array) -> pa.Array:
    decoded: list[str] = []
    for row, value in enumerate(values.to_pylist()):
        try:
            decoded.append(value.decode())
        except UnicodeDecodeError as e:
            raise LabelError(row, value, "is not UTF-8; classes of other names are text") from e
    return pa.array(decoded, pa.string())


def _natural_key(name: str) -> tuple[Any, ...]:
    return (0, Decimal(name), name) if is_numeral(name) else (1, Decimal(0), name)


def _of_texts(texts: pa.Array, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    found = pc.fill_null(pc.index_in(texts, value_set=pa.array(list(classes), pa.string())), _UNKNOWN)
    return cast("npt.NDArray[np.int64]", found.to_numpy(zero_copy_only=False).astype(np.int64))


def _of_booleans(texts: pa.Array, classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Match false and true in any letters, else 0 and 1."""
    exact = _of_texts(texts, classes)
    lower = [name.lower() for name in classes]
    words = ("false", "true") if {"false", "true"} <= set(lower) else ("0", "1")
    places = {
        text: lower.index(word) for text, word in zip(("false", "true"), words, strict=True) if lower.count(word) == 1
    }
    return np.array(
        [places.get(text, _UNKNOWN) if at < 0 else at for text, at in zip(texts.to_pylist(), exact, strict=True)],
        np.int64,
    )


def _named(values: npt.NDArray[np.int64], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    """Find the classes named by numbers, by their digits or else by another spelling of the number."""
    exact = {name: index for index, name in enumerate(classes)}
    alike: dict[Decimal, int] = {}
    for index, name in enumerate(classes):
        if is_numeral(name):
            alike[Decimal(name)] = _SEVERAL if Decimal(name) in alike else index
    found = (exact.get(str(value), alike.get(Decimal(value), _UNKNOWN)) for value in values.tolist())
    return np.fromiter(found, np.int64, len(values))


def _indexed(values: npt.NDArray[np.int64], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    return np.where((values >= 0) & (values < len(classes)), values, _UNKNOWN)
